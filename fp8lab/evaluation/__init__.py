"""Scores: a trained model under lm-eval (EleutherAI's language model evaluation harness).

`evaluate` writes ``eval.json`` into a run's record: lm-eval's own result dictionary (results with standard
errors, n-samples, versions, n-shot, higher_is_better, groups), without its copy of every item and task
definition, and keys of ours beside it:

==================  ==========================================================================
``config``          suite, precision, context length, device, limit, versions
``data``            where the items came from; by task the split scored and the files' SHA-256
``truncated``       by task: items longer than the context, which lost their left end
``random_guess``    by task: accuracy of guessing among the choices
``constant_guess``  by task: accuracy of always giving the same answer; null where items differ in theirs
``answers``         by task: bits a byte and a character of the correct answers
==================  ==========================================================================

Groups (MMLU) have an entry of their own beside their members' in all of them.

Runs are compared by their scores in BF16, whatever they were trained in. Scores in an FP8 recipe are therefore in a
file of their own, ``eval-<recipe>.json``, which the article's tables do not read.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import huggingface_hub.constants
import pandas as pd
import torch
from datasets.exceptions import DatasetGenerationError
from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from fp8lab import precision as precision_swap
from fp8lab import records
from fp8lab.config import RECIPES, Recipe, RunConfig
from fp8lab.data import TokenDataset, load_mixture
from fp8lab.data.loader import check_tokenizer
from fp8lab.errors import UserError
from fp8lab.evaluation import answers
from fp8lab.evaluation.adapter import GPTAdapter
from fp8lab.evaluation.suites import Suite, demo_suite, full_suite_from_files, full_suite_from_hub
from fp8lab.model import GPT
from fp8lab.progress import Progress, ProgressFile
from fp8lab.training.checkpoint import load_model

SuiteName = Literal["demo", "full"]

BOOTSTRAP_ITERATIONS = 1_000
"""Resamples behind the standard error of LAMBADA's perplexity; accuracies' errors are exact."""
FEWSHOT_SEED = 1234
"""lm-eval's default."""


def evaluate(
    config: RunConfig,
    *,
    records_dir: Path,
    data_dir: Path,
    checkpoints_dir: Path,
    suite: SuiteName,
    eval_data_dir: Path | None = None,
    precision: Recipe | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score a finished run and write ``eval.json``, or another recipe's `scores_file`, into its record.

    Args:
        config: the run.
        records_dir: the result goes to ``<records_dir>/<plan>/<run>``.
        data_dir: built data sets: the tokenizer, and the demo's held-out text.
        checkpoints_dir: trained weights.
        suite: 'demo' (our own items, offline) or 'full' (the article's eleven tasks).
        eval_data_dir: items of the full suite as JSON lines; None: from the Hugging Face hub.
        precision: recipe to score in, with the run's own head and exclusions; None: BF16.
        limit: only the first so many items of each task.

    Returns:
        What was written.

    Raises:
        UserError: an unknown suite or precision, weights, data or items that cannot be had, or weights that were
            trained with another tokenizer than the data set's.
    """
    _check(suite, precision)
    run_folder = checkpoints_dir / config.plan / config.run
    model, config = load_model(run_folder, "cuda" if torch.cuda.is_available() else "cpu")
    dataset = TokenDataset.open(load_mixture(config.mixture), data_dir)
    record_folder = records.record_dir(records_dir, config.plan, config.run)
    _check_tokenizer(record_folder, dataset)
    convert_for_scoring(model, config, precision)
    progress = ProgressFile(run_folder)
    adapter = GPTAdapter(model, dataset.encoding, on_progress=lambda now: progress.update(lambda: now))
    with tempfile.TemporaryDirectory(prefix="fp8lab-tasks-") as name:
        tasks = _build_suite(suite, Path(name), dataset, eval_data_dir)
        result = run_suite(adapter, tasks, limit)
    result["config"] |= {"suite": suite, "precision": precision or "bf16", "emulated": _emulated(precision)}
    scores = json.dumps(result, indent=1).encode() + b"\n"
    records.write_atomically(record_folder / scores_file(precision), scores)
    items = sum(counts["effective"] for counts in result["n-samples"].values())
    progress.update(lambda: Progress(stage="done", step=items, steps=items), now=True)
    return result


def scores_file(precision: Recipe | None) -> str:
    """Name of the file in a run's record that holds its scores in `precision`; None: in BF16."""
    return "eval.json" if precision in (None, "bf16") else f"eval-{precision}.json"


def run_suite(model: Any, suite: Suite, limit: int | None = None) -> dict[str, Any]:
    """Ask `model`, any of lm-eval's, every item of `suite`; the result as ``eval.json`` holds it.

    Raises:
        UserError: items that cannot be had.
    """
    with _offline(suite.source != "hub"):
        tasks = _load_tasks(suite)
        result: dict[str, Any] = evaluator.evaluate(
            lm=model, task_dict=tasks, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True
        )
    samples = _samples_by_task(result)
    choices = {task: items for task, items in samples.items() if len(items[0]["arguments"]) > 1}
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    return {
        **{key: result[key] for key in kept if key in result},
        "n-samples": result["n-samples"] | _group_counts(result),
        "config": {
            "model": type(model).__name__,
            "max_length": model.max_length,
            "device": str(model.device),
            "limit": limit,
            "bootstrap_iters": BOOTSTRAP_ITERATIONS,
            "versions": {package: metadata.version(package) for package in ("lm_eval", "torch", "datasets")},
        },
        "data": {"source": suite.source, "tasks": suite.data},
        "truncated": {
            task: sum(any(pair in getattr(model, "truncated", ()) for pair in item["arguments"]) for item in items)
            for task, items in samples.items()
        },
        "random_guess": {task: answers.random_guess(items) for task, items in choices.items()},
        "constant_guess": {task: answers.constant_guess(items) for task, items in choices.items()},
        "answers": {task: answers.correct_answers(items) for task, items in choices.items()},
    }


def score_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """``eval.json`` for reading: a row a task and metric, members of a group left out.

    Columns: task, metric, value, stderr, n (items), shots, random guess; accuracies as fractions.
    """
    members = {name for names in result.get("group_subtasks", {}).values() for name in names}
    rows = []
    for task, values in result["results"].items():
        if task in members:
            continue
        metrics = [key for key in values if "," in key and not key.split(",")[0].endswith("_stderr")]
        for key in metrics:
            metric, filter_name = key.split(",")
            is_accuracy = metric.startswith("acc")
            rows.append(
                {
                    "task": values.get("alias", task),
                    "metric": metric,
                    "value": values[key],
                    "stderr": pd.to_numeric(values.get(f"{metric}_stderr,{filter_name}"), errors="coerce"),
                    "n": result["n-samples"][task]["effective"],
                    "shots": result["n-shot"].get(task, 0),
                    "random guess": result["random_guess"].get(task) if is_accuracy else None,
                }
            )
        if task in result["answers"]:
            answer = result["answers"][task]
            rows.append(
                {
                    "task": values.get("alias", task),
                    "metric": "answer bits/byte",
                    "value": answer["bits_per_byte"],
                    "stderr": answer["bits_per_byte_stderr"],
                    "n": answer["n"],
                    "shots": result["n-shot"].get(task, 0),
                }
            )
    return pd.DataFrame(rows)


def convert_for_scoring(model: GPT, config: RunConfig, precision: Recipe | None) -> None:
    """Swap `model` in place into the recipe `precision`, with the run's head and exclusions; None leaves it BF16."""
    if precision is None or precision == "bf16":
        return
    precision_swap.check_kernels(model.config, precision, config.head, model.embedding.weight.device)
    precision_swap.convert(model, precision, config.head, config.high_precision, fused=config.fused)


def _emulated(precision: Recipe | None) -> bool:
    return precision not in (None, "bf16") and not precision_swap.fp8_tensor_cores()


def _check(suite: str, precision: str | None) -> None:
    if suite not in get_args(SuiteName):
        raise UserError(f"suite: {suite!r} does not exist; accepted: {', '.join(get_args(SuiteName))}")
    if precision is not None and precision not in RECIPES:
        raise UserError(f"precision: {precision!r} does not exist; accepted: {', '.join(RECIPES)}")


def _check_tokenizer(record_folder: Path, dataset: TokenDataset) -> None:
    if not (record_folder / "record.json").exists():
        return
    check_tokenizer(dataset, records.read(record_folder).provenance.tokenizer_sha256, record_folder / "record.json")


def _build_suite(suite: SuiteName, folder: Path, dataset: TokenDataset, eval_data_dir: Path | None) -> Suite:
    if suite == "demo":
        return demo_suite(folder, dataset)
    return full_suite_from_hub(folder) if eval_data_dir is None else full_suite_from_files(folder, eval_data_dir)


def _load_tasks(suite: Suite) -> dict[str, Any]:
    manager = TaskManager(include_path=suite.folder, include_defaults=False)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in suite.names:
        try:
            part = manager.load(name)
        except (DatasetGenerationError, OSError, datasets.exceptions.DatasetNotFoundError) as error:
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            if suite.source == "hub":
                raise UserError(
                    f"task {name}: its items could not be had from the Hugging Face hub ({cause}); connect, or give "
                    "a folder of evaluation data"
                ) from error
            raise UserError(f"task {name}: its items cannot be read as JSON lines ({cause})") from error
        for key in loaded:
            loaded[key] |= part.get(key, {})
    for task in loaded["tasks"].values():
        _seed(task)
    return loaded


def _seed(task: Task) -> None:
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _samples_by_task(result: Mapping[str, Any]) -> dict[str, Sequence[answers.Sample]]:
    """Logged items of every task and, pooled, of every group."""
    samples = dict(result["samples"])
    for group, members in result.get("group_subtasks", {}).items():
        pooled = [item for member in members for item in result["samples"].get(member, [])]
        if pooled:
            samples[group] = pooled
    return samples


def _group_counts(result: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """n-samples of each group: the sum over its members."""
    counts = result["n-samples"]
    return {
        group: {key: sum(counts[member][key] for member in members) for key in ("original", "effective")}
        for group, members in result.get("group_subtasks", {}).items()
        if members
    }


@contextlib.contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """No look-up of any host by Hugging Face's libraries, which read their variables only when first imported."""
    datasets.disable_progress_bars()
    if not enabled:
        yield
        return
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    modules: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    flags = [module.HF_HUB_OFFLINE for module in modules]
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.HF_HUB_OFFLINE = flag
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
