"""A series: compact runs that train one after another in one process.

A run of half a minute would spend as long again on starting: imports, verifying the data, compiling. In
a series all of that is paid once, since runs that differ only in seed share their compiled graphs
(`fp8lab.training.session`) and the data is verified once a process. Each run has a record of its own, and its
tables move into those that the plan's runs share as soon as it is finished.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from fp8lab import records
from fp8lab.config import RunConfig
from fp8lab.errors import UserError
from fp8lab.progress import is_locked
from fp8lab.provenance import collect_provenance
from fp8lab.records import TrainRecord
from fp8lab.training.divergence import Diverged
from fp8lab.training.signals import Interrupted, stop_signals
from fp8lab.training.trainer import train

OnEnd = Callable[[TrainRecord], None]
"""Called with the record of each run that has ended, whatever its status."""


def train_series(
    configs: Sequence[RunConfig], *, records_dir: Path, data_dir: Path, checkpoints_dir: Path, on_end: OnEnd
) -> None:
    """Train each of `configs` that is not finished, in order; one that fails does not stop the others.

    On SIGTERM or SIGINT the run in progress is checkpointed and no other begins.

    Raises:
        Interrupted: a signal arrived, and not every run has been trained.
        Exception: a run failed in a way that may have left the device unusable; its record says so, and the rest
            should be trained in another process.
    """
    record: TrainRecord | None = None
    with stop_signals() as received:
        for config in configs:
            if received:
                # It came too late to stop the run before, which is finished.
                raise Interrupted(received[0], record.steps if record else 0)
            folder = records.record_dir(records_dir, config.plan, config.run)
            record = _read(folder)
            if record is None or record.status != "finished":
                _train_one(config, records_dir=records_dir, data_dir=data_dir, checkpoints_dir=checkpoints_dir)
            record = _read(folder)
            if record is not None and record.status == "finished":
                records.share_tables(records_dir, config.plan, config.run)
            if record is not None:
                on_end(record)
            # A run's model and its compiled blocks refer to each other.
            gc.collect()


def _train_one(config: RunConfig, *, records_dir: Path, data_dir: Path, checkpoints_dir: Path) -> None:
    """Train one run; where it cannot be trained as it is, its record says why."""
    folder = records.record_dir(records_dir, config.plan, config.run)
    before = _read(folder)
    try:
        train(config, records_dir=records_dir, data_dir=data_dir, checkpoints_dir=checkpoints_dir)
    except Diverged:
        pass
    except UserError as error:
        # The record of a run that another process trains is that process's to write.
        if _read(folder) == before and not is_locked(checkpoints_dir / config.plan / config.run):
            record = records.started(config, collect_provenance("unknown"), emulated=False)
            record.status, record.reason = "failed", str(error)
            records.write(record, records_dir)


def _read(folder: Path) -> TrainRecord | None:
    """The run's record, if there is one."""
    if not (folder / "record.json").exists():
        return None
    record = records.read(folder)
    assert isinstance(record, TrainRecord)
    return record
