"""Benchmark scores, for reading."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fp8lab.analysis import scores
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.units import number


def score_table(runs: RunSet) -> pd.DataFrame:
    """Scores for reading: a row a run, a column a task and metric; items and random guess in the first two rows."""
    table = scores.of_runs(runs)
    header: list[dict[str, object]] = [{"model": "items", "recipe": ""}, {"model": "random guess", "recipe": ""}]
    rows: dict[tuple[str, str, int], dict[str, object]] = {}
    for _, score in table.iterrows():
        column = f"{score['task']} ({score['metric']})"
        header[0][column] = "–" if pd.isna(score["n"]) else f"{int(score['n']):,}"
        header[1][column] = "–" if pd.isna(score["random_guess"]) else f"{score['random_guess']:.0%}"
        row = rows.setdefault(
            (score["size"], score["recipe"], score["seed"]), {"model": score["size"], "recipe": score["recipe"]}
        )
        row[column] = _score(score["value"], score["stderr"], score["metric"])
    return pd.DataFrame([*header, *rows.values()]) if rows else pd.DataFrame()


def _score(value: float, stderr: float, metric: str) -> str:
    if metric in ("acc", "acc_norm"):
        return f"{value:.1%}" if stderr != stderr else f"{value:.1%} ± {stderr:.1%}"
    return f"{value:.4g}"


def answer_bits(runs: RunSet) -> pd.DataFrame:
    """Bits a byte of the correct answers' text: a row a scored run, a column a task with answers to choose from."""
    rows = [
        {"model": size, "recipe": recipe}
        | {row["task"]: f"{row['value']:.3f} ± {row['stderr']:.3f}" for row in of_run.to_dict("records")}
        for (size, recipe, _), of_run in scores.answer_bits(runs).groupby(["size", "recipe", "run"], sort=False)
    ]
    return pd.DataFrame(rows)


def published_comparison(tasks: Sequence[str], models: Sequence[str], runs: RunSet | None = None) -> pd.DataFrame:
    """Accuracy (%) on `tasks`: guessing, our own runs where they were scored on all items, and published `models`.

    A column is zero-shot lm-eval in the metric of its heading. Where a model has no such figure, the nearest
    there is stands in its place, with a mark of `PUBLISHED_MARKS`.
    """
    guess: dict[str, object] = {"model": "random guess", "parameters": "", "training tokens": ""}
    rows = [guess | {_heading(task): f"{scores.RANDOM_GUESS[task]:.0%}".rstrip("%") for task in tasks}]
    rows += [own for run in (runs.runs if runs else ()) if (own := _own_scores(run, tasks)) is not None]
    published = scores.published_scores()
    for model in models:
        of_model = published[published["model"] == model]
        if of_model.empty:
            continue
        row: dict[str, object] = {
            "model": model,
            "parameters": of_model["params"].iloc[0],
            "training tokens": next(iter(of_model["train_tokens"].dropna()), "–"),
        }
        rows.append(row | {_heading(task): _published_score(of_model, task) for task in tasks})
    return pd.DataFrame(rows) if len(rows) > 1 else pd.DataFrame()


PUBLISHED_MARKS = {
    "ᵃ": "acc, where the column is acc_norm, or the reverse",
    "ᵇ": "another harness than lm-eval, or one that the source does not state",
    "ᶜ": "few-shot",
    "ᵈ": "another split than the task's own",
}


def _published_score(of_model: pd.DataFrame, task: str) -> str:
    """The model's figure nearest to zero-shot lm-eval in the task's usual metric, marked for how it differs."""
    candidates = []
    for _, row in of_model[(of_model["task"] == task) & of_model["metric"].isin(("acc", "acc_norm"))].iterrows():
        differs = {
            "ᵃ": row["protocol"] == "lm-eval" and row["metric"] != scores.usual_metric(task),
            "ᵇ": row["protocol"] != "lm-eval",
            "ᶜ": str(row["shots"]) != "0",
        }
        candidates.append(("".join(mark for mark, is_so in differs.items() if is_so), float(row["value"])))
    if not candidates:
        return "–"
    marks, value = min(candidates, key=lambda candidate: (len(candidate[0]), candidate[0]))
    return f"{value:.1f}{marks}"


def _own_scores(run: Run, tasks: Sequence[str]) -> dict[str, object] | None:
    """A run's row of `published_comparison`; None where it was not scored on all items of any of the tasks."""
    evaluation = run.evaluation or {}
    results = evaluation.get("results", {})
    if evaluation.get("config", {}).get("limit") is not None or not any(task in results for task in tasks):
        return None
    row: dict[str, object] = {
        "model": f"this project, {run.size} {run.recipe}",
        "parameters": number(run.parameters),
        "training tokens": number(run.record.tokens),
    }
    for task in tasks:
        metric, values = scores.usual_metric(task), results.get(task, {})
        value, stderr = values.get(f"{metric},none"), values.get(f"{metric}_stderr,none")
        if value is None:
            row[_heading(task)] = "–"
            continue
        error = f" ± {100 * stderr:.1f}" if isinstance(stderr, int | float) else ""
        other_split = "note" in evaluation.get("data", {}).get("tasks", {}).get(task, {})
        row[_heading(task)] = f"{100 * value:.1f}{error}{'ᵈ' if other_split else ''}"
    return row


def _heading(task: str) -> str:
    return f"{task} ({scores.usual_metric(task)})"
