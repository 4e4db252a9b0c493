"""Executing a plan: every run through papermill, finished ones skipped, interrupted ones resumed.

Each run is one execution of ``runs/train.ipynb`` and, where its plan asks for scores, one of
``runs/evaluate.ipynb``, in a process of its own. This module never imports torch: it starts the
notebooks, draws progress from the file that the worker keeps (`fp8lab.progress`), passes SIGINT and
SIGTERM on as one request to checkpoint and stop, and makes sure that however a notebook dies, a
record says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fp8lab import records
from fp8lab.config import Plan, RunConfig, read_run_config
from fp8lab.errors import UserError
from fp8lab.progress import Progress as WorkerProgress
from fp8lab.progress import read_progress

POLL_SECONDS = 0.25
LINE_SECONDS = 15.0
"""Between progress lines where the output is not a terminal."""


@dataclass(frozen=True)
class Workspace:
    """Where a project keeps its inputs and results; the defaults are relative to its root."""

    root: Path = Path()
    records: Path = Path("runs/records")
    data: Path = Path("data")
    checkpoints: Path = Path("checkpoints")

    def record(self, config: RunConfig) -> Path:
        return records.record_dir(self.records, config.plan, config.run)

    def checkpoint(self, config: RunConfig) -> Path:
        return self.checkpoints / config.plan / config.run


@dataclass(frozen=True)
class Options:
    """What a user may ask of one `run_plan` beyond the plan itself."""

    mixture: str | None = None
    """Replaces the plan's mixture."""
    evaluation_data: Path | None = None
    """Folder of evaluation data, for machines without the hub."""
    replace: bool = False
    """Run again where a finished record was made with another configuration."""


class Interrupted(Exception):
    """The user's signal, after the worker has stopped."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


def run_plan(plan: Plan, workspace: Workspace, options: Options, console: Console) -> int:
    """Execute every run of `plan` that is not finished.

    Returns:
        The number of runs that failed or diverged.

    Raises:
        UserError: a finished record was made with another configuration and `options.replace` is off.
        Interrupted: SIGINT or SIGTERM arrived; the run in progress has a checkpoint.
    """
    for config in plan.runs:
        _check_unchanged(config, workspace, options)
    unsuccessful = 0
    for number, config in enumerate(plan.runs, start=1):
        label = f"{plan.name} {number}/{len(plan.runs)} {config.run}"
        unsuccessful += not _run_one(config, plan, workspace, options, console, label)
    return unsuccessful


def _run_one(
    config: RunConfig, plan: Plan, workspace: Workspace, options: Options, console: Console, label: str
) -> bool:
    """Train, then score, whatever of it is not done yet. True if all of it now is."""
    folder = workspace.record(config)
    parameters: dict[str, Any] = {
        "plan": str(plan.path),
        "run": config.run,
        "records_dir": str(workspace.records),
        "data_dir": str(workspace.data),
        "checkpoints_dir": str(workspace.checkpoints),
        "mixture": options.mixture,
    }
    trained = finished_record(folder)
    did_something = trained is None
    if trained is None:
        _execute(workspace, "train", config, parameters, console, label)
        trained = finished_record(folder)
    if trained is None:
        _report_unfinished(config, workspace, console, label)
        return False
    if config.evaluation != "none" and not (folder / "eval.json").exists():
        did_something = True
        parameters |= {"suite": config.evaluation, "eval_data_dir": _text(options.evaluation_data), "precision": None}
        if not _execute(workspace, "evaluate", config, parameters, console, label):
            console.print(f"{label}: scoring failed; see {folder / 'evaluate.ipynb'}", style="red")
            return False
    loss = f"validation loss {trained.final.validation_loss:.4f} nats" if trained.final else "no final loss"
    console.print(f"{label}: {'finished' if did_something else 'already finished'}, {loss}")
    return True


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
    config = read_run_config(folder / "config.json")
    # From the configuration saved beside the weights, not from a plan that may have moved on.
    parameters: dict[str, Any] = {
        "plan": str(folder / "config.json"),
        "run": config.run,
        "records_dir": str(workspace.records),
        "data_dir": str(workspace.data),
        "checkpoints_dir": str(workspace.checkpoints),
        "mixture": None,
        "suite": suite,
        "eval_data_dir": _text(evaluation_data),
        "precision": precision,
    }
    label = f"{config.plan} {config.run}"
    done = _execute(workspace, "evaluate", config, parameters, console, label)
    notebook = workspace.record(config) / "evaluate.ipynb"
    console.print(f"{label}: scored; see {notebook}" if done else f"{label}: scoring failed; see {notebook}")
    return done


def status_rows(plan: Plan | None, records_dir: Path, checkpoints_dir: Path) -> list[tuple[str, ...]]:
    """A row a run: plan, run, status, step, loss, tokens/s, detail."""
    known = {(config.plan, config.run): config for config in plan.runs} if plan else {}
    pattern = f"{plan.name if plan else '*'}/*/record.json"
    recorded = {(path.parts[-3], path.parts[-2]) for path in records_dir.glob(pattern)}
    return [_status_row(*key, records_dir, checkpoints_dir) for key in [*known, *sorted(recorded - set(known))]]


def _status_row(plan: str, run: str, records_dir: Path, checkpoints_dir: Path) -> tuple[str, ...]:
    folder = records.record_dir(records_dir, plan, run)
    if not (folder / "record.json").exists():
        return plan, run, "to do", "", "", "", ""
    record = records.read(folder)
    if not isinstance(record, records.TrainRecord):
        return plan, run, record.status, "", "", "", record.kind
    progress = read_progress(checkpoints_dir / plan / run / "progress.json")
    if record.status == "running" and progress is not None:
        alive = progress.is_alive()
        status = "running" if alive else "stopped: the same command resumes"
        loss = "" if progress.loss is None else f"{progress.loss:.4f}"
        speed = "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}"
        return plan, run, status, f"{progress.step}/{progress.steps}", loss, speed, progress.summary() if alive else ""
    loss = f"{record.final.validation_loss:.4f}" if record.final else ""
    speed = f"{record.speed.tokens_per_second_median:,.0f}" if record.speed else ""
    return plan, run, record.status, str(record.steps), loss, speed, record.reason or ""


def finished_record(folder: Path) -> records.TrainRecord | None:
    """The run's record if the run finished."""
    if not (folder / "record.json").exists():
        return None
    record = records.read(folder)
    return record if isinstance(record, records.TrainRecord) and record.status == "finished" else None


def _check_unchanged(config: RunConfig, workspace: Workspace, options: Options) -> None:
    record = finished_record(workspace.record(config))
    if record is None:
        return
    planned = config.model_dump(mode="json")
    changed = [key for key in planned if record.config.get(key) != planned[key]]
    if not changed:
        return
    folder = workspace.record(config)
    if not options.replace:
        raise UserError(
            f"{folder}: made with another configuration ({', '.join(changed)} changed); "
            "--replace runs it again, or give the plan another name"
        )
    for path in (folder / "record.json", folder / "eval.json"):
        path.unlink(missing_ok=True)


def _report_unfinished(config: RunConfig, workspace: Workspace, console: Console, label: str) -> None:
    folder = workspace.record(config)
    record = records.read(folder)
    console.print(f"{label}: {record.status}: {record.reason}; see {folder / 'train.ipynb'}", style="red")


def _execute(
    workspace: Workspace,
    template: str,
    config: RunConfig,
    parameters: dict[str, Any],
    console: Console,
    label: str,
) -> bool:
    """Execute ``runs/<template>.ipynb`` into the run's record. True if the notebook ran to its end."""
    folder = workspace.record(config)
    folder.mkdir(parents=True, exist_ok=True)
    work = workspace.checkpoint(config)
    work.mkdir(parents=True, exist_ok=True)
    log_path = work / f"{template}.log"
    command = [
        sys.executable,
        "-m",
        "papermill",
        f"runs/{template}.ipynb",
        str((folder / f"{template}.ipynb").resolve()),
    ]
    # JSON is YAML: one argument carries every parameter with its type.
    command += ["--parameters_yaml", json.dumps(parameters), "--kernel", "python3", "--no-progress-bar"]
    with log_path.open("wb") as log:
        # A session of its own, so that a terminal's Ctrl-C reaches the worker once, through `_forwarding`.
        process = subprocess.Popen(
            command, cwd=workspace.root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    started = time.time()

    def latest() -> WorkerProgress | None:
        progress = read_progress(work / "progress.json")
        return progress if progress is not None and progress.updated_utc.timestamp() >= started - 1 else None

    with _forwarding(process, latest) as received:
        _watch(process, latest, console, f"{label} {template}")
    if template == "train" and finished_record(folder) is None:
        _ensure_unfinished_record(config, folder, log_path, interrupted=bool(received))
    if received:
        raise Interrupted(received[0])
    return process.returncode == 0


@contextmanager
def _forwarding(process: subprocess.Popen[bytes], latest: Callable[[], WorkerProgress | None]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the worker, once; yields the list that received signals are added to."""
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        progress = latest()
        # The training process checkpoints and stops; before it reports, there is nothing to save.
        target = progress.pid if progress is not None else process.pid
        try:
            os.kill(target, signal.SIGTERM)
        except ProcessLookupError:
            process.terminate()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(
    process: subprocess.Popen[bytes],
    latest: Callable[[], WorkerProgress | None],
    console: Console,
    label: str,
) -> None:
    """Show the worker's progress until it ends: a bar on a terminal, a line now and then elsewhere."""
    next_line = time.monotonic() + LINE_SECONDS
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task: TaskID = bar.add_task(label, total=None, state="starting")
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            progress = latest()
            if progress is None:
                continue
            state = progress.summary()
            bar.update(task, completed=progress.step, total=progress.steps, state=state)
            if not console.is_terminal and time.monotonic() >= next_line:
                console.print(f"{label}: {state}")
                next_line = time.monotonic() + LINE_SECONDS


def _ensure_unfinished_record(config: RunConfig, folder: Path, log: Path, *, interrupted: bool) -> None:
    """If the notebook died without a word (killed, out of memory, no import), write the record it could not."""
    path = folder / "record.json"
    if path.exists():
        record = records.read(folder)
        if not isinstance(record, records.TrainRecord) or record.status != "running":
            return
    else:
        record = records.started(config, records.collect_provenance("unknown"), emulated=False)
    record.status = "interrupted" if interrupted else "failed"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    record.reason = (
        "stopped by a signal" if interrupted else (lines[-1].strip() if lines else "the notebook's process died")
    )
    records.write(record, folder.parent.parent)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
