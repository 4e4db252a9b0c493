"""Executing a plan: every run through papermill, finished ones skipped, interrupted ones resumed.

Each run is one execution of ``runs/train.ipynb`` and, where its plan asks for scores, one of ``runs/evaluate.ipynb``,
in a process of its own; an entry's compact runs are as many executions of ``runs/series.ipynb`` as there are jobs.
This module trains nothing: it decides what is left to do and in which order, and has the notebooks executed on a
stage (`fp8lab.running.stage`), each on GPUs of its own while there are enough (`fp8lab.running.gpus`).
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fp8lab import records
from fp8lab.config import Recipe, RunConfig, changed_fields, earlier_config, read_run_config
from fp8lab.data import Loader, TokenDataset, load_mixture
from fp8lab.data.shards import MANIFEST
from fp8lab.errors import UserError
from fp8lab.plan import Plan
from fp8lab.progress import is_locked
from fp8lab.running.gpus import Share, shares, visible_gpus
from fp8lab.running.stage import POLL_SECONDS, Stage, open_stage
from fp8lab.running.workspace import Workspace, finished_record

ONE_AT_A_TIME = (Share((), 1),)
"""One notebook at a time, on whatever GPUs this process sees."""


@dataclass(frozen=True)
class Options:
    """What a user may ask of one `run_plan` beyond the plan itself."""

    mixture: str | None = None
    """Replaces the plan's mixture."""
    evaluation_data: Path | None = None
    """Folder of evaluation data, for machines without the hub."""
    replace: bool = False
    """Run again where a finished record was made with another configuration."""
    nproc: int = 1
    """Processes a run, one a GPU of this machine."""
    jobs: int = 1
    """Runs at once: each on GPUs of its own while there are enough; on a CPU they share its cores."""


def run_plan(plan: Plan, workspace: Workspace, options: Options, console: Console) -> int:
    """Execute every run of `plan` that is not finished.

    Returns:
        The number of runs that failed or diverged.

    Raises:
        UserError: a finished record was made with another configuration and `options.replace` is off.
        StageInterrupted: SIGINT or SIGTERM arrived; the runs in progress have checkpoints.
    """
    dataset_of = functools.cache(functools.partial(_dataset, data_dir=workspace.data))
    for config in plan.runs:
        _check_unchanged(config, workspace, dataset_of, replace=options.replace)
    labels = {
        config.run: f"{plan.name} {number}/{len(plan.runs)} {config.run}"
        for number, config in enumerate(plan.runs, start=1)
    }
    done = {config.run for config in plan.runs if _is_done(config, workspace)}
    errands = _errands(plan.runs, options, done)
    to_do = sum(any(config.run not in done for config in errand) for errand in errands)
    jobs = max(1, min(options.jobs, to_do))
    machine = shares(jobs, options.nproc, visible_gpus()) if jobs > 1 else ONE_AT_A_TIME
    with open_stage(workspace, console, machine, options.nproc) as stage:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(_execute, errand, plan, options, stage, labels) for errand in errands]
            # Signals reach the main thread only while it is not blocked in a lock.
            while not all(future.done() for future in futures):
                time.sleep(POLL_SECONDS)
        return sum(future.result() for future in futures)


def evaluate_run(
    folder: Path,
    workspace: Workspace,
    suite: str,
    evaluation_data: Path | None,
    precision: Recipe | None,
    console: Console,
) -> bool:
    """Score one trained run, given its checkpoint folder, and print how it ended. True if it was scored.

    Raises:
        UserError: the folder's configuration is damaged.
        StageInterrupted: SIGINT or SIGTERM arrived.
    """
    # From the configuration saved beside the weights, not from a plan that may have moved on.
    path = folder / "config.json"
    config = read_run_config(path)
    label = f"{config.plan} {config.run}"
    with open_stage(workspace, console, ONE_AT_A_TIME) as stage:
        done = _evaluate(stage, config, path, None, suite, evaluation_data, precision, label)
        if done:
            stage.print(f"{label}: scored; see {_scores_folder(config, precision, workspace) / 'evaluate.ipynb'}")
    return done


def measure_speed(
    plan: Path,
    name: str,
    occasion: str,
    only: Sequence[str],
    budget_seconds: float | None,
    workspace: Workspace,
    console: Console,
) -> bool:
    """Time the steps of the speed plan `name` in the file `plan`. True if the notebook ran to its end.

    Raises:
        StageInterrupted: SIGINT or SIGTERM arrived; cases that were done are recorded.
    """
    parameters = {"plan": str(plan), "occasion": occasion, "only": list(only), "budget_seconds": budget_seconds}
    folder = records.record_dir(workspace.records, name, occasion)
    work = workspace.checkpoints / name / occasion
    with open_stage(workspace, console, ONE_AT_A_TIME) as stage:
        done = stage.notebook("speed", folder, work, parameters, {work: f"{name} {occasion}"})
        if not done:
            _end_speed_record(folder, stage.reason(work / "speed.log"), workspace.records)
    return done


def _end_speed_record(folder: Path, reason: str, records_dir: Path) -> None:
    """The record of a measurement that died in the middle says no longer that it runs, and keeps the cases it has."""
    if not (folder / "record.json").exists():
        return
    record = records.read(folder)
    if record.status == "running":
        record.status, record.reason = "interrupted", reason
        records.write(record, records_dir)


def _is_done(config: RunConfig, workspace: Workspace) -> bool:
    """True for a run that is trained and, where its plan asks for scores, scored."""
    folder = workspace.record(config)
    return finished_record(folder) is not None and _is_scored(config, folder)


def _is_scored(config: RunConfig, folder: Path) -> bool:
    """True for a run that was scored, in BF16, with the suite that its plan asks for, or needs no scores.

    Raises:
        UserError: the scores are damaged.
    """
    if config.evaluation == "none":
        return True
    if not (folder / "eval.json").exists():
        return False
    made_with = records.read_eval(folder).get("config", {})
    # Scores of the full suite, hours of work, never give way to the demo's. Older ones do not say what they are.
    enough = (config.evaluation, "full", None)
    return made_with.get("suite") in enough and made_with.get("precision", "bf16") == "bf16"


def _errands(runs: Sequence[RunConfig], options: Options, done: Set[str]) -> list[tuple[RunConfig, ...]]:
    """What one job executes in order: a run and the decay branches that leave it, or a series that shares a process.

    A series are neighbours in the plan that are compact and alike but for recipe and seed, shared among as many
    processes as there are jobs.

    Args:
        done: names of the runs that nothing is left to do for.
    """
    names = {config.run for config in runs}

    def family(config: RunConfig) -> tuple[RunConfig, ...]:
        branches = (run for run in runs if run.parent is not None and run.parent.run == config.run)
        return (config, *itertools.chain.from_iterable(map(family, branches)))

    families = [family(config) for config in runs if config.parent is None or config.parent.run not in names]

    def alike(family: tuple[RunConfig, ...]) -> str:
        exclude = {"run", "recipe", "seed"} if _shares_process(family[0], options) else set()
        return family[0].model_dump_json(exclude=exclude)

    errands = [tuple(itertools.chain.from_iterable(group)) for _, group in itertools.groupby(families, alike)]
    return [
        part
        for errand in errands
        for part in (_split(errand, options.jobs, done) if _shares_process(errand[0], options) else [errand])
    ]


def _shares_process(config: RunConfig, options: Options) -> bool:
    """True for a run of a series: a run that takes several processes shares none of them."""
    return config.compact and options.nproc == 1


def _split(runs: tuple[RunConfig, ...], parts: int, done: Set[str]) -> list[tuple[RunConfig, ...]]:
    """At most `parts` of `runs`, in order, with equally many that are not done, to within one."""
    before = list(itertools.accumulate((config.run not in done for config in runs), initial=0))
    waiting = before[-1]
    parts = min(parts, waiting)
    if parts < 2:
        return [runs]
    places = [min(count, waiting - 1) * parts // waiting for count in before[:-1]]
    grouped = itertools.groupby(zip(places, runs, strict=True), key=lambda pair: pair[0])
    return [tuple(config for _, config in group) for _, group in grouped]


def _execute(errand: Sequence[RunConfig], plan: Plan, options: Options, stage: Stage, labels: Mapping[str, str]) -> int:
    """Execute one of `_errands`. The number of its runs that are not done."""
    if _shares_process(errand[0], options):
        return _run_series(errand, plan, options, stage, labels)
    return sum(not _train_and_score(config, plan, options, stage, labels[config.run]) for config in errand)


def _run_series(
    series: Sequence[RunConfig], plan: Plan, options: Options, stage: Stage, labels: Mapping[str, str]
) -> int:
    """Train those of `series` that are not finished, one after another. The number that still are not."""
    waiting = []
    for config in series:
        trained = finished_record(stage.workspace.record(config))
        if trained is not None:
            stage.print(f"{labels[config.run]}: already finished, {_loss(trained)}")
        elif is_locked(stage.workspace.work(config)):
            stage.print(f"{labels[config.run]}: another process is training it; see fp8lab status", style="red")
        else:
            waiting.append(config)
    while waiting and stage.received is None:
        # A run that takes its process down takes none of those after it along.
        done = stage.execute_series(waiting, {"plan": str(plan.path), "mixture": options.mixture}, labels)
        for config in waiting[:done]:
            _print_end(stage, config, labels[config.run])
        waiting = waiting[done:]
    return sum(finished_record(stage.workspace.record(config)) is None for config in series)


def _print_end(stage: Stage, config: RunConfig, label: str) -> None:
    """How a run of a series ended."""
    trained = finished_record(stage.workspace.record(config))
    if trained is not None:
        stage.print(f"{label}: finished, {_loss(trained)}")
    elif not is_locked(stage.workspace.work(config)):
        record = records.read(stage.workspace.record(config))
        stage.print(f"{label}: {record.status}: {record.reason}", style="red")


def _train_and_score(config: RunConfig, plan: Plan, options: Options, stage: Stage, label: str) -> bool:
    """Train, then score, whatever of it is not done yet. True if all of it now is."""
    if stage.received is not None:
        return False
    folder = stage.workspace.record(config)
    trained = _finished_and_shared(config, stage.workspace)
    if trained is not None and _is_scored(config, folder):
        stage.print(f"{label}: already finished, {_loss(trained)}")
        return True
    if trained is None:
        if is_locked(stage.workspace.work(config)):
            # Its record, notebook and log are that process's to write.
            stage.print(f"{label}: another process is training it; see fp8lab status", style="red")
            return False
        parameters = {"plan": str(plan.path), "run": config.run, "mixture": options.mixture, "nproc": options.nproc}
        stage.train(config, parameters, label)
        trained = _finished_and_shared(config, stage.workspace)
        if trained is None:
            record, notebook = records.read(folder), stage.workspace.notebooks(config) / "train.ipynb"
            stage.print(f"{label}: {record.status}: {record.reason}; see {notebook}", style="red")
            return False
    if config.evaluation != "none" and not _evaluate(
        stage, config, plan.path, options.mixture, config.evaluation, options.evaluation_data, None, label
    ):
        return False
    stage.print(f"{label}: finished, {_loss(trained)}")
    return True


def _finished_and_shared(config: RunConfig, workspace: Workspace) -> records.TrainRecord | None:
    """The run's record if the run finished; a compact one's tables are then among those that its plan shares."""
    record = finished_record(workspace.record(config))
    if record is not None and config.compact:
        records.share_tables(workspace.records, config.plan, config.run)
    return record


def _loss(record: records.TrainRecord) -> str:
    return f"validation loss {record.final.validation_loss:.4f} nats" if record.final else "no final loss"


def _evaluate(
    stage: Stage,
    config: RunConfig,
    plan: Path,
    mixture: str | None,
    suite: str,
    evaluation_data: Path | None,
    precision: Recipe | None,
    label: str,
) -> bool:
    """Execute ``runs/evaluate.ipynb`` for one run, and print why where that fails. True if it ran to its end."""
    parameters = {
        "plan": str(plan),
        "run": config.run,
        "mixture": mixture,
        "suite": suite,
        "eval_data_dir": None if evaluation_data is None else str(evaluation_data),
        "precision": precision,
    }
    folder, work = _scores_folder(config, precision, stage.workspace), stage.workspace.work(config)
    done = stage.notebook("evaluate", folder, work, parameters, {work: label})
    if not done:
        reason, notebook = stage.reason(work / "evaluate.log"), folder / "evaluate.ipynb"
        stage.print(f"{label}: scoring failed: {reason}; see {notebook}", style="red")
    return done


def _scores_folder(config: RunConfig, precision: Recipe | None, workspace: Workspace) -> Path:
    """Where the executed notebook of a scoring goes: that in an FP8 recipe does not replace that in BF16."""
    folder = workspace.notebooks(config)
    return folder if precision in (None, "bf16") else folder / f"eval-{precision}"


def _check_unchanged(
    config: RunConfig, workspace: Workspace, dataset_of: Callable[[str], TokenDataset | None], *, replace: bool
) -> None:
    folder = workspace.record(config)
    record = finished_record(folder)
    if record is None:
        return
    before = earlier_config(record.config, f"{folder / 'record.json'}: config")
    changed = changed_fields(before, config) or _changed_data(record, config, dataset_of)
    if not changed:
        return
    if not replace:
        raise UserError(
            f"{folder}: made with another configuration ({', '.join(changed)} changed); "
            "--replace runs it again, or give the plan another name"
        )
    records.drop_shared_rows(workspace.records, config.plan, config.run)
    for old in (folder, workspace.work(config)):
        shutil.rmtree(old, ignore_errors=True)


def _dataset(mixture: str, data_dir: Path) -> TokenDataset | None:
    """A mixture's tokens; None where they are not built."""
    wanted = load_mixture(mixture)
    return TokenDataset.open(wanted, data_dir) if (data_dir / wanted.name / MANIFEST).exists() else None


def _changed_data(
    record: records.TrainRecord, config: RunConfig, dataset_of: Callable[[str], TokenDataset | None]
) -> list[str]:
    """What of the mixture is no longer what the run was trained on; nothing where that cannot be told."""
    trained_on = record.provenance
    dataset = dataset_of(config.mixture) if trained_on.data_sha256 else None
    if dataset is None:
        return []
    if dataset.sha256 != trained_on.data_sha256:
        return ["the mixture's data"]
    rows = config.global_batch_tokens // config.model.seq_len
    loader = Loader(dataset, seq_len=config.model.seq_len, seed=config.seed, global_batch_sequences=rows)
    # Weights decide the order of the data and are no part of its hash: as many passes over each domain are the same.
    return [] if trained_on.epochs in (None, loader.epochs(record.steps)) else ["the mixture's weights"]
