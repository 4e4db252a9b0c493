"""Starting one run's ranks from one process: what the notebook does where a run takes several GPUs.

The ranks are the same workers that ``torchrun --nproc-per-node N -m fp8lab.training.trainer CONFIG.json`` starts, and
it is torchrun's own launcher that starts them here. They write the run's record; this process waits, and hands out
the record's tables as they grow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fp8lab import records
from fp8lab.config import RunConfig
from fp8lab.errors import UserError
from fp8lab.progress import Progress, ProgressFile
from fp8lab.records import TrainRecord
from fp8lab.training.checkpoint import saved_steps
from fp8lab.training.failures import PeerFailed
from fp8lab.training.signals import Interrupted
from fp8lab.training.trainer import OnLog

WORKER = "fp8lab.training.trainer"
"""Module that each rank runs."""
WATCH_SECONDS = 2.0
SHUTDOWN_SECONDS = 600
"""What ranks have for their last checkpoint between a stop signal and being killed: 18 GB (1.5B) at 30 MB/s."""
CONSEQUENCE = f"{PeerFailed.__name__}: "
"""Begins what the launcher has of a rank that failed of another's failure; the rest is the other's."""


def launch(
    config: RunConfig,
    processes: int,
    *,
    records_dir: Path,
    data_dir: Path,
    checkpoints_dir: Path,
    on_log: OnLog | None = None,
) -> TrainRecord:
    """`fp8lab.training.trainer.train` on `processes` GPUs of this machine (or, without GPUs, in as many processes).

    Raises:
        UserError: as `train`.
        Stopped: a signal reached a rank, or this process, which passes it on and waits for the ranks' checkpoint:
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds at most, or `SHUTDOWN_SECONDS`.
        RuntimeError: a rank failed, or all diverged; the message is the first one's.
    """
    folder = records.record_dir(records_dir, config.plan, config.run)
    before = records.content(folder)
    work = checkpoints_dir / config.plan / config.run
    work.mkdir(parents=True, exist_ok=True)
    # Until a rank reports, signals to the run are this process's to pass on.
    ProgressFile(work).update(lambda: Progress(stage="starting", steps=config.steps), now=True)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.5,
        **_patience(),
    )
    with tempfile.TemporaryDirectory() as temporary, _signal_handlers_kept(), _watched(folder, on_log):
        path = Path(temporary) / "config.json"
        path.write_text(config.model_dump_json())
        arguments = ["-m", WORKER, str(path), "--records-dir", str(records_dir)]
        arguments += ["--data-dir", str(data_dir), "--checkpoints-dir", str(checkpoints_dir)]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        try:
            elastic_launch(settings, sys.executable)(*arguments)
        except SignalException as error:
            # It may have come too late to stop a run that was about to finish.
            if records.content(folder) == before or records.read(folder).status != "finished":
                raise Stopped(error.sigval, work) from None
        except ChildFailedError as error:
            raise _what_happened(error, work) from None
    record = records.read(folder)
    assert isinstance(record, TrainRecord)
    return record


def _patience() -> dict[str, Any]:
    """How long ranks have to stop, as torch's launcher is told; that of torch 2.11 takes no word and waits 30 s."""
    if "shutdown_timeout" not in {field.name for field in dataclasses.fields(LaunchConfig)}:
        return {}
    return {"shutdown_timeout": int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS))}


class Stopped(Interrupted):
    """A signal arrived and all ranks are gone; says from where the run can go on.

    That is the newest checkpoint, not the record's step: of what ranks that had to be killed trained since,
    nothing is left.
    """

    def __init__(self, signal_number: int, work: Path) -> None:
        """
        Args:
            signal_number: the signal.
            work: the run's folder of checkpoints.
        """
        step = max(saved_steps(work), default=None)
        super().__init__(signal_number, step or 0)
        self._name, self._step = signal.Signals(signal_number).name, step

    def __str__(self) -> str:
        if self._step is None:
            return f"{self._name} before there was a checkpoint; the same command starts again"
        return f"{self._name}; the same command resumes after step {self._step}"


def _what_happened(error: ChildFailedError, work: Path) -> Exception:
    """The failure that came first, as the exception that `train` would have raised.

    Args:
        error: what the launcher says of all ranks.
        work: the run's folder of checkpoints.
    """
    rank, failure = min(error.failures.items(), key=lambda item: _order(item[1]))
    if failure.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        return Stopped(failure.exitcode - 128, work)
    if failure.exitcode == 2:
        return UserError(re.sub(r"^\w+: ", "", _message(failure)))
    if _is_consequence(failure):
        return RuntimeError(_message(failure).removeprefix(CONSEQUENCE))
    return RuntimeError(f"rank {rank}: {_message(failure)}")


def _order(failure: ProcessFailure) -> tuple[bool, bool, int]:
    """Causes before consequences; of causes first a process that was killed, which could not say so."""
    return _is_consequence(failure), failure.exitcode >= 0, failure.timestamp


def _is_consequence(failure: ProcessFailure) -> bool:
    # The launcher ends by SIGTERM what still runs when one rank has failed.
    return _message(failure).startswith(CONSEQUENCE) or failure.exitcode == -signal.SIGTERM


def _message(failure: ProcessFailure) -> str:
    """'<type>: <text>' of a rank's exception."""
    return str(failure.message["message"] if isinstance(failure.message, dict) else failure.message)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers that the launcher replaces by its own."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    previous = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(folder: Path, on_log: OnLog | None) -> Iterator[None]:
    """Call `on_log`, from a thread, whenever the ranks have written the record's tables."""
    if on_log is None:
        yield
        return
    done = threading.Event()
    # Written after metrics.parquet, so that both are there.
    path = folder / "validation.parquet"

    def watch() -> None:
        seen, stopping = 0, False
        while not stopping:
            stopping = done.wait(WATCH_SECONDS)
            # What is not there, or not yet, or is being replaced, the next turn may find.
            with contextlib.suppress(UserError, OSError):
                written = path.stat().st_mtime_ns
                if written != seen:
                    read = partial(records.read_table, folder)
                    on_log(partial(read, "metrics"), partial(read, "validation"))
                    seen = written

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
