"""Benchmark scores: those of scored runs, and those that others published.

Frames have plain column names and raw numbers; `fp8lab.tables` and `fp8lab.figures` show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from fp8lab.analysis.runs import Run, RunSet
from fp8lab.errors import UserError

RANDOM_GUESS = {
    "hellaswag": 0.25,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "openbookqa": 0.25,
    "sciq": 0.25,
    "mmlu": 0.25,
    "boolq": 0.5,
    "piqa": 0.5,
    "winogrande": 0.5,
}
"""Accuracy of guessing among a task's choices (a few ARC items have three or five)."""


def of_runs(runs: RunSet) -> pd.DataFrame:
    """Every score of every scored run, as lm-eval gave it; of a group (MMLU) the group's own, not its members'.

    Columns: size, recipe, seed, tokens, task, metric, value, stderr (NaN where lm-eval gives none), n (items),
    random_guess (accuracy of guessing; NaN where it has no meaning or is unknown).
    """
    rows = [row for run in runs.runs if run.evaluation is not None for row in _run_scores(run)]
    columns = ["size", "recipe", "seed", "tokens", "task", "metric", "value", "stderr", "n", "random_guess"]
    return pd.DataFrame(rows, columns=columns)


def _run_scores(run: Run) -> list[dict[str, object]]:
    evaluation = run.evaluation or {}
    members = _members(evaluation)
    guesses = RANDOM_GUESS | evaluation.get("random_guess", {})
    rows: list[dict[str, object]] = []
    for task, values in evaluation["results"].items():
        if task in members:
            continue
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if filter_name != "none" or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,none")
            rows.append(
                {
                    "size": run.size,
                    "recipe": run.recipe,
                    "seed": run.record.seed,
                    "tokens": run.record.tokens,
                    # The alias says where another split than the task's own was scored.
                    "task": values.get("alias", task),
                    "metric": metric,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else np.nan,
                    "n": evaluation.get("n-samples", {}).get(task, {}).get("effective"),
                    "random_guess": guesses.get(task, np.nan) if metric in ("acc", "acc_norm") else np.nan,
                }
            )
    return rows


def _members(evaluation: Mapping[str, Any]) -> set[str]:
    """The tasks that only count within their group (MMLU's subjects)."""
    return {name for names in evaluation.get("group_subtasks", {}).values() for name in names}


def answer_bits(runs: RunSet) -> pd.DataFrame:
    """Bits a byte of the correct answers' text, of every task with answers to choose from.

    Columns: size, recipe, seed, tokens, run, task, value, stderr (over items).
    """
    rows = [
        {
            "size": run.size,
            "recipe": run.recipe,
            "seed": run.record.seed,
            "tokens": run.record.tokens,
            "run": run.record.run,
            "task": evaluation["results"][task].get("alias", task),
            "value": values["bits_per_byte"],
            "stderr": values["bits_per_byte_stderr"],
        }
        for run in runs.runs
        if (evaluation := run.evaluation)
        for task, values in evaluation.get("answers", {}).items()
        if task not in _members(evaluation)
    ]
    return pd.DataFrame(rows, columns=["size", "recipe", "seed", "tokens", "run", "task", "value", "stderr"])


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Every FP8 score minus BF16's on the same task by a model of the same size, seed and tokens.

    Args:
        table: one score a run and task, in columns as `of_runs` has them.

    Returns:
        Columns: recipe, size, seed, tokens, task, difference, noise (its standard error, as of other items).
    """
    key = ["size", "seed", "tokens", "task"]
    bf16 = table[table["recipe"] == "bf16"]
    both = table[table["recipe"] != "bf16"].merge(bf16, on=key, suffixes=("", "_bf16"))
    both["difference"] = both["value"] - both["value_bf16"]
    both["noise"] = np.hypot(both["stderr"], both["stderr_bf16"])
    return both[["recipe", *key, "difference", "noise"]]


def usual_metric(task: str) -> str:
    """The accuracy that a task is usually quoted in."""
    return "acc_norm" if task.partition(" (")[0] in ("hellaswag", "arc_challenge", "openbookqa", "piqa") else "acc"


def usual_accuracies(runs: RunSet) -> pd.DataFrame:
    """The rows of `of_runs` that are a task's accuracy as it is usually quoted: one a run and task."""
    table = of_runs(runs)
    return table[table["metric"] == table["task"].map(usual_metric)]


PUBLISHED_COLUMNS = (
    "model",
    "params",
    "train_tokens",
    "task",
    "metric",
    "value",
    "shots",
    "protocol",
    "source_title",
    "source_url",
    "notes",
)


def published_scores() -> pd.DataFrame:
    """Scores that others published for comparable models, a source for each (fp8lab/analysis/published_scores.csv).

    Raises:
        UserError: the file lacks a column.
    """
    with resources.as_file(resources.files("fp8lab.analysis") / "published_scores.csv") as path:
        if not path.exists():
            return pd.DataFrame(columns=list(PUBLISHED_COLUMNS))
        table = pd.read_csv(path)
        missing = [column for column in PUBLISHED_COLUMNS if column not in table.columns]
        if missing:
            raise UserError(f"{path}: missing column {', '.join(missing)}")
    return table


def published_accuracy(model: str, task: str, protocol: str, shots: int = 0, metric: str = "acc") -> float:
    """One published accuracy, in percent.

    Raises:
        KeyError: there is no such figure.
    """
    table = published_scores()
    wanted = {"model": model, "task": task, "protocol": protocol, "shots": str(shots), "metric": metric}
    for column, value in wanted.items():
        table = table[table[column].astype(str) == value]
    if table.empty:
        raise KeyError(f"published_scores.csv: no {metric} of {model} on {task}, {shots}-shot by {protocol}")
    return float(table["value"].iloc[0])
