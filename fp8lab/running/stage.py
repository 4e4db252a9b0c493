"""Where notebooks execute: a process each, watched until it ends.

A stage has papermill execute them (`fp8lab.notebooks`) on what each may have of the machine (`fp8lab.running.gpus`),
draws progress from the file that each worker keeps (`fp8lab.progress`), passes SIGINT and SIGTERM on as requests to
checkpoint and stop, and makes sure that however a notebook dies, a record says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fp8lab import notebooks, records
from fp8lab.config import RunConfig
from fp8lab.progress import Progress, is_locked, read_progress
from fp8lab.provenance import collect_provenance, command_line, utc_now
from fp8lab.running.gpus import Share
from fp8lab.running.workspace import Workspace

POLL_SECONDS = 0.25
LINE_SECONDS = 15.0
"""Between progress lines where the output is not a terminal."""


class StageInterrupted(Exception):
    """The user's signal, after the workers have stopped."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


@contextmanager
def open_stage(workspace: Workspace, console: Console, machine: Sequence[Share], processes: int = 1) -> Iterator[Stage]:
    """A `Stage` that receives this process's SIGINT and SIGTERM.

    Args:
        machine: what each of the notebooks at once has of it.
        processes: of each notebook.

    Raises:
        StageInterrupted: on leaving, if a signal arrived.
    """
    text, state = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[state]}"))
    columns = (text, BarColumn(), state, TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        stage = Stage(workspace, console, bars, machine, processes)
        previous = {number: signal.signal(number, stage.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stage
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if stage.received is not None:
        raise StageInterrupted(stage.received)


class Worker:
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


class Stage:
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
        self._workers: set[Worker] = set()

    def print(self, text: str, style: str | None = None) -> None:
        if self.received is None:
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: no new workers, and each signal to all there are: the second ends what is slow to stop."""
        self.received = self.received or number
        for worker in list(self._workers):
            worker.stop()

    def train(self, config: RunConfig, parameters: dict[str, Any], label: str) -> bool:
        """Execute ``runs/train.ipynb`` for one run, which has a record then. True if the notebook ran to its end."""
        folder, work = self.workspace.record(config), self.workspace.work(config)
        before = records.content(folder)
        done = self.notebook("train", self.workspace.notebooks(config), work, parameters, {work: label})
        self._ensure_record(config, folder, work / "train.log", before)
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
            worker = Worker(process, labels)
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
        command = [sys.executable, "-m", notebooks.__name__, f"runs/{template}.ipynb", notebook, json.dumps(parameters)]
        environment = os.environ | {
            "FP8LAB_COMMAND": command_line(),
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

    def _watch(self, worker: Worker, template: str) -> None:
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
            record = records.started(config, collect_provenance("unknown"), emulated=False)
        record.status, record.reason = "failed" if self.received is None else "interrupted", self.reason(log)
        record.provenance.ended_utc = utc_now()
        records.write(record, self.workspace.records)
