"""TensorBoard event files of a run: ``tensorboard --logdir checkpoints``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

FOLDER_NAME = "tensorboard"


class EventFile:
    """Scalars of a run by step, written by a thread of TensorBoard's own."""

    def __init__(self, run_folder: Path, step: int) -> None:
        """
        Args:
            run_folder: the run's folder.
            step: steps done; events after it, of a process that was killed, are superseded.
        """
        # TensorBoard purges from the given step on.
        self._writer = SummaryWriter(str(run_folder / FOLDER_NAME), purge_step=step + 1)

    def add_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of ``metrics.parquet``."""
        for row in rows:
            for name in ("loss", "lr", "grad_norm", "tokens_per_s"):
                self._writer.add_scalar(f"train/{name}", row[name], row["step"])

    def add_validation(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of ``validation.parquet``."""
        for row in rows:
            for name in ("loss", "bits_per_byte"):
                self._writer.add_scalar(f"validation/{name}/{row['domain']}", row[name], row["step"])

    def close(self) -> None:
        """Write what is pending. A full disk is for the checkpoint to report: events are only news."""
        with contextlib.suppress(OSError):
            self._writer.close()
