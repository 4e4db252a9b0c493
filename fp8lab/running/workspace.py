"""Where a project keeps its inputs and results, and which of its runs are finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8lab import records
from fp8lab.config import RunConfig


@dataclass(frozen=True)
class Workspace:
    """The folders; the defaults are relative to the project's root."""

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


def finished_record(folder: Path) -> records.TrainRecord | None:
    """The run's record if the run finished."""
    if not (folder / "record.json").exists():
        return None
    record = records.read(folder)
    return record if isinstance(record, records.TrainRecord) and record.status == "finished" else None
