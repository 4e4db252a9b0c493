"""Executing a plan: every run through papermill, finished ones skipped, interrupted ones resumed.

Each run is one execution of ``runs/train.ipynb`` and, where its plan asks for scores, one of
``runs/evaluate.ipynb``, in a process of its own; an entry's compact runs are as many executions of
``runs/series.ipynb`` as there are jobs. This module trains nothing: it starts the notebooks, each on GPUs
of its own while there are enough (`fp8lab.gpus`), draws progress from the file that each worker
keeps (`fp8lab.progress`), passes SIGINT and SIGTERM on as requests to checkpoint and stop, and makes
sure that however a notebook dies, a record says so.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fp8lab import records
from fp8lab.config import Plan, RunConfig, changed_fields, earlier_config, read_run_config
from fp8lab.errors import UserError
from fp8lab.gpus import Share, shares, visible_gpus
from fp8lab.progress import SILENT_SECONDS, Progress, clock, is_locked, read_progress

POLL_SECONDS = 0.25
LINE_SECONDS = 15.0
"""Between progress lines where the output is not a terminal."""
ALONE = (Share((), 1),)
"""One notebook at a time, on whatever GPUs this process sees."""


@dataclass(frozen=True)
class Workspace:
    """Where a project keeps its inputs and results; the defaults are relative to its root."""

    root: Path = Path()
    records: Path = Path("runs/records")
    data: Path = Path("data")
    checkpoints: Path = Path("checkpoints")

    def record(self, config: RunConfig) -> Path:
        return records.record_dir(self.records, config.plan, config.run)

    def work(self, config: RunConfig) -> Path:
        """Where a run keeps what is not its record: checkpoints, weights, progress, logs."""
        return self.checkpoints / config.plan / config.run

    def notebooks(self, config: RunConfig) -> Path:
        """Where a run's executed notebooks go: beside its record, or with its logs if the record is to be small."""
        return self.work(config) if config.compact else self.record(config)

    def parameters(self) -> dict[str, Any]:
        """The folders, as notebooks take them."""
        return {
            "records_dir": str(self.records),
            "data_dir": str(self.data),
            "checkpoints_dir": str(self.checkpoints),
        }


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


class Interrupted(Exception):
    """The user's signal, after the workers have stopped."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


def run_plan(plan: Plan, workspace: Workspace, options: Options, console: Console) -> int:
    """Execute every run of `plan` that is not finished.

    Returns:
        The number of runs that failed or diverged.

    Raises:
        UserError: a finished record was made with another configuration and `options.replace` is off.
        Interrupted: SIGINT or SIGTERM arrived; the runs in progress have checkpoints.
    """
    for config in plan.runs:
        _check_unchanged(config, workspace, replace=options.replace)
    labels = {
        config.run: f"{plan.name} {number}/{len(plan.runs)} {config.run}"
        for number, config in enumerate(plan.runs, start=1)
    }
    done = {config.run for config in plan.runs if _is_done(config, workspace)}
    errands = _errands(plan.runs, options, done)
    to_do = sum(any(config.run not in done for config in errand) for errand in errands)
    jobs = max(1, min(options.jobs, to_do))
    machine = shares(jobs, options.nproc, visible_gpus()) if jobs > 1 else ALONE
    with _stage(workspace, console, machine, options.nproc) as stage:
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
    precision: str | None,
    console: Console,
) -> bool:
    """Score one trained run, given its checkpoint folder. True if the notebook ran to its end.

    Raises:
        UserError: the folder's configuration is damaged.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    # From the configuration saved beside the weights, not from a plan that may have moved on.
    path = folder / "config.json"
    config = read_run_config(path)
    label = f"{config.plan} {config.run}"
    with _stage(workspace, console, ALONE) as stage:
        done = _evaluate(stage, config, path, None, suite, evaluation_data, precision, label)
    console.print(
        f"{label}: {'scored' if done else 'scoring failed'}; see {workspace.record(config) / 'evaluate.ipynb'}"
    )
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
        Interrupted: SIGINT or SIGTERM arrived; cases that were done are recorded.
    """
    parameters = {"plan": str(plan), "occasion": occasion, "only": list(only), "budget_seconds": budget_seconds}
    folder = records.record_dir(workspace.records, name, occasion)
    work = workspace.checkpoints / name / occasion
    with _stage(workspace, console, ALONE) as stage:
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


def finished_record(folder: Path) -> records.TrainRecord | None:
    """The run's record if the run finished."""
    if not (folder / "record.json").exists():
        return None
    record = records.read(folder)
    return record if isinstance(record, records.TrainRecord) and record.status == "finished" else None


def _is_done(config: RunConfig, workspace: Workspace) -> bool:
    """True for a run that is trained and, where its plan asks for scores, scored."""
    folder = workspace.record(config)
    return finished_record(folder) is not None and _is_scored(config, folder)


def _is_scored(config: RunConfig, folder: Path) -> bool:
    return config.evaluation == "none" or (folder / "eval.json").exists()


def status_rows(plan: Plan | None, records_dir: Path, checkpoints_dir: Path) -> list[tuple[str, ...]]:
    """A row a run: plan, run, status, step, loss, tokens/s, detail."""
    planned = [(config.plan, config.run) for config in plan.runs] if plan else []
    recorded = {
        (path.parts[-3], path.parts[-2]) for path in records_dir.glob(f"{plan.name if plan else '*'}/*/record.json")
    }
    keys = planned + sorted(recorded - set(planned))
    return [_status_row(name, run, records_dir, checkpoints_dir) for name, run in keys]


def _status_row(plan: str, run: str, records_dir: Path, checkpoints_dir: Path) -> tuple[str, ...]:
    folder = records.record_dir(records_dir, plan, run)
    if not (folder / "record.json").exists():
        return plan, run, "to do", "", "", "", ""
    record = records.read(folder)
    if not isinstance(record, records.TrainRecord):
        return plan, run, record.status, "", "", "", record.kind
    work = checkpoints_dir / plan / run
    progress = read_progress(work / "progress.json")
    if record.status == "running" and progress is not None:
        status, detail = _status_in_progress(progress, work)
        loss = "" if progress.loss is None else f"{progress.loss:.4f}"
        speed = "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}"
        return plan, run, status, f"{progress.step}/{progress.steps}", loss, speed, detail
    loss = f"{record.final.validation_loss:.4f}" if record.final else ""
    median = record.speed.tokens_per_second_median if record.speed else None
    speed = "" if median is None else f"{median:,.0f}"
    return plan, run, record.status, str(record.steps), loss, speed, record.reason or ""


def _status_in_progress(progress: Progress, work: Path) -> tuple[str, str]:
    """Status and detail of a run whose record says that it is running, which a killed process cannot take back.

    Args:
        progress: the last news of it.
        work: its folder, which the process that trains it holds locked.
    """
    summary, age = progress.summary(), progress.age_seconds()
    heard = f"on {progress.host}, last heard of {clock(age)} ago"
    if progress.is_here():
        # A launcher has the ranks that will take the lock still to start.
        is_starting = progress.stage == "starting" and progress.is_alive()
        return ("running", summary) if is_starting or is_locked(work) else ("stopped", "the same command resumes it")
    # Another machine's lock is seen here only on some file systems, and its processes are on none.
    if is_locked(work) or age < SILENT_SECONDS:
        return "running", f"{summary}, {heard}"
    return "silent", f"{heard}; if it has stopped, the same command resumes it"


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


def _execute(
    errand: Sequence[RunConfig], plan: Plan, options: Options, stage: _Stage, labels: Mapping[str, str]
) -> int:
    """Execute one of `_errands`. The number of its runs that are not done."""
    if _shares_process(errand[0], options):
        return _run_series(errand, plan, options, stage, labels)
    return sum(not _train_and_score(config, plan, options, stage, labels[config.run]) for config in errand)


def _run_series(
    series: Sequence[RunConfig], plan: Plan, options: Options, stage: _Stage, labels: Mapping[str, str]
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
            stage.print_end(config, labels[config.run])
        waiting = waiting[done:]
    return sum(finished_record(stage.workspace.record(config)) is None for config in series)


def _train_and_score(config: RunConfig, plan: Plan, options: Options, stage: _Stage, label: str) -> bool:
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
        stage.execute("train", config, parameters, label)
        trained = _finished_and_shared(config, stage.workspace)
        if trained is None:
            record, notebook = records.read(folder), stage.workspace.notebooks(config) / "train.ipynb"
            stage.print(f"{label}: {record.status}: {record.reason}; see {notebook}", style="red")
            return False
    if config.evaluation != "none" and not _evaluate(
        stage, config, plan.path, options.mixture, config.evaluation, options.evaluation_data, None, label
    ):
        stage.print(f"{label}: scoring failed; see {folder / 'evaluate.ipynb'}", style="red")
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
    stage: _Stage,
    config: RunConfig,
    plan: Path,
    mixture: str | None,
    suite: str,
    evaluation_data: Path | None,
    precision: str | None,
    label: str,
) -> bool:
    parameters = {
        "plan": str(plan),
        "run": config.run,
        "mixture": mixture,
        "suite": suite,
        "eval_data_dir": None if evaluation_data is None else str(evaluation_data),
        "precision": precision,
    }
    return stage.execute("evaluate", config, parameters, label)


def _check_unchanged(config: RunConfig, workspace: Workspace, *, replace: bool) -> None:
    folder = workspace.record(config)
    record = finished_record(folder)
    if record is None:
        return
    before = earlier_config(record.config, f"{folder / 'record.json'}: config")
    changed = changed_fields(before, config)
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


@contextmanager
def _stage(workspace: Workspace, console: Console, machine: Sequence[Share], processes: int = 1) -> Iterator[_Stage]:
    """A `_Stage` that receives this process's SIGINT and SIGTERM.

    Args:
        machine: what each of the notebooks at once has of it.
        processes: of each notebook.

    Raises:
        Interrupted: on leaving, if a signal arrived.
    """
    text, state = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[state]}"))
    columns = (text, BarColumn(), state, TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        stage = _Stage(workspace, console, bars, machine, processes)
        previous = {number: signal.signal(number, stage.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stage
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if stage.received is not None:
        raise Interrupted(stage.received)


class _Worker:
    """One notebook in execution."""

    def __init__(self, process: subprocess.Popen[bytes], labels: Mapping[Path, str]) -> None:
        """
        Args:
            labels: what to call each of its runs, by the folder where the run reports its progress.
        """
        self.process = process
        self.labels = labels
        self.started = time.time()

    def progress(self) -> tuple[str, Progress] | None:
        """What the notebook's kernel last reported and the label of the run; None before its first report."""
        reports = [
            (label, progress)
            for folder, label in self.labels.items()
            if (progress := read_progress(folder / "progress.json")) is not None
            and progress.updated_utc.timestamp() >= self.started
        ]
        return max(reports, key=lambda report: report[1].updated_utc, default=None)

    def stop(self) -> None:
        """Ask the kernel to checkpoint and stop; before it reports, there is nothing to save."""
        report = self.progress()
        target = self.process.pid if report is None else report[1].pid
        try:
            os.kill(target, signal.SIGTERM)
        except ProcessLookupError:
            self.process.terminate()


class _Stage:
    """Where notebooks execute: starts them, shows their progress, stops them on a signal."""

    def __init__(
        self, workspace: Workspace, console: Console, bars: Bars, machine: Sequence[Share], processes: int
    ) -> None:
        self.workspace = workspace
        self.received: int | None = None
        self._console, self._bars = console, bars
        self._jobs, self._processes = len(machine), processes
        self._free: SimpleQueue[Share] = SimpleQueue()
        for share in machine:
            self._free.put(share)
        self._workers: set[_Worker] = set()

    def print(self, text: str, style: str | None = None) -> None:
        if self.received is None:
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def print_end(self, config: RunConfig, label: str) -> None:
        """How a run of a series ended."""
        trained = finished_record(self.workspace.record(config))
        if trained is not None:
            self.print(f"{label}: finished, {_loss(trained)}")
        elif not is_locked(self.workspace.work(config)):
            record = records.read(self.workspace.record(config))
            self.print(f"{label}: {record.status}: {record.reason}", style="red")

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: no new workers, and each signal to all there are: the second ends what is slow to stop."""
        self.received = self.received or number
        for worker in list(self._workers):
            worker.stop()

    def execute(self, template: str, config: RunConfig, parameters: dict[str, Any], label: str) -> bool:
        """Execute ``runs/<template>.ipynb`` for one run. True if the notebook ran to its end."""
        folder, work = self.workspace.record(config), self.workspace.work(config)
        before = records.content(folder)
        done = self.notebook(template, self.workspace.notebooks(config), work, parameters, {work: label})
        if template == "train":
            self._ensure_record(config, folder, work / f"{template}.log", before)
        return done

    def execute_series(
        self, configs: Sequence[RunConfig], parameters: dict[str, Any], labels: Mapping[str, str]
    ) -> int:
        """Execute ``runs/series.ipynb`` once for all of `configs`. The number of them, from the first, that it got to.

        The executed notebook stays with the logs, in the folder of the first: records of compact runs are small.
        """
        work = self.workspace.work(configs[0])
        before = {config.run: records.content(self.workspace.record(config)) for config in configs}
        parameters = parameters | {"runs": [config.run for config in configs]}
        self.notebook(
            "series", work, work, parameters, {self.workspace.work(config): labels[config.run] for config in configs}
        )
        attempted = [
            config for config in configs if records.content(self.workspace.record(config)) != before[config.run]
        ]
        if not attempted and self.received is not None:
            return 0
        # If it died before the first, that is what became of all of them.
        for config in attempted or configs:
            if is_locked(self.workspace.work(config)):
                continue
            self._ensure_record(config, self.workspace.record(config), work / "series.log", before[config.run])
        return configs.index(attempted[-1]) + 1 if attempted else len(configs)

    def notebook(
        self, template: str, folder: Path, work: Path, parameters: dict[str, Any], labels: Mapping[Path, str]
    ) -> bool:
        """Execute ``runs/<template>.ipynb`` into `folder`. True if it ran to its end.

        Args:
            work: where its log goes.
            labels: what to call each run, by the folder where it reports its progress.
        """
        folder.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        log = work / f"{template}.log"
        share = self._free.get()
        try:
            process = self._start(template, folder, parameters | self.workspace.parameters(), log, share)
            worker = _Worker(process, labels)
            self._workers.add(worker)
            if self.received is not None:
                # The signal came while the process was starting.
                worker.stop()
            try:
                self._watch(worker, template)
            finally:
                self._workers.discard(worker)
        finally:
            self._free.put(share)
        return process.returncode == 0

    def _start(
        self, template: str, folder: Path, parameters: dict[str, Any], log: Path, share: Share
    ) -> subprocess.Popen[bytes]:
        notebook = os.path.relpath(folder / f"{template}.ipynb", self.workspace.root)
        command = [sys.executable, "-m", "papermill", f"runs/{template}.ipynb", notebook]
        # JSON is YAML: one argument carries every parameter with its type.
        command += ["--parameters_yaml", json.dumps(parameters), "--kernel", "python3", "--no-progress-bar"]
        environment = os.environ | {
            "FP8LAB_COMMAND": records.command_line(),
            "FP8LAB_CONCURRENT_RUNS": str(share.runs),
            **share.environment,
        }
        if self._jobs > 1:
            threads = max(1, (os.cpu_count() or 1) // (self._jobs * self._processes))
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with log.open("wb") as output:
            # A session of its own, so that a terminal's Ctrl-C reaches the worker once, through `stop`.
            return subprocess.Popen(
                command,
                cwd=self.workspace.root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _watch(self, worker: _Worker, template: str) -> None:
        """Show the worker's progress until it ends: a bar on a terminal, a line now and then elsewhere."""
        next_line = time.monotonic() + LINE_SECONDS
        first = next(iter(worker.labels.values()))
        task: TaskID = self._bars.add_task(f"{first} {template}", total=None, state="starting")
        while worker.process.poll() is None:
            time.sleep(POLL_SECONDS)
            report = worker.progress()
            if report is None:
                continue
            label, progress = report
            description, state = f"{label} {template}", progress.summary()
            self._bars.update(task, description=description, completed=progress.step, total=progress.steps, state=state)
            if not self._console.is_terminal and time.monotonic() >= next_line:
                self.print(f"{description}: {state}")
                next_line = time.monotonic() + LINE_SECONDS
        self._bars.remove_task(task)

    def reason(self, log: Path) -> str:
        """Why a notebook with this log did not run to its end."""
        if self.received is not None:
            return f"stopped by {signal.Signals(self.received).name}"
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "the notebook's process died"

    def _ensure_record(self, config: RunConfig, folder: Path, log: Path, before: bytes | None) -> None:
        """If the notebook died without a word (killed, out of memory, no import), write the record it could not.

        Args:
            before: the record that an earlier attempt left, whose reason is not this one's.
        """
        path = folder / "record.json"
        if path.exists():
            record = records.read(folder)
            silent = record.status == "running" or records.content(folder) == before
            if not isinstance(record, records.TrainRecord) or not silent:
                return
        else:
            record = records.started(config, records.collect_provenance("unknown"), emulated=False)
        record.status, record.reason = "failed" if self.received is None else "interrupted", self.reason(log)
        record.provenance.ended_utc = records.utc_now()
        records.write(record, self.workspace.records)
