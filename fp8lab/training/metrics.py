"""Training metrics, collected without making the host wait for the device.

A step leaves its numbers on the device. `Arrivals.flush` copies those of many steps to the host at once,
and on a GPU picks the copy up only at the next flush, when it has long arrived.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from torch import Tensor

COLUMN_TYPES = {
    "step": "int64",
    "tokens": "int64",
    "loss": "float64",
    "lr": "float64",
    "grad_norm": "float64",
    "step_ms": "float64",
    "tokens_per_s": "float64",
    "skipped": "bool",
}


class Stopwatch:
    """Time between `start` and `stop` on the device's own clock, read later without stopping it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._milliseconds = 0.0

    def start(self) -> Stopwatch:
        if self._on_gpu:
            self._events[0].record()
        else:
            self._milliseconds = -time.perf_counter() * 1e3
        return self

    def stop(self) -> None:
        if self._on_gpu:
            self._events[1].record()
        else:
            self._milliseconds += time.perf_counter() * 1e3

    def milliseconds(self) -> float:
        """Elapsed time; on a GPU waits for the second event."""
        if self._on_gpu:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1])
        return self._milliseconds


EntryT = TypeVar("EntryT")


class Arrivals(Generic[EntryT]):
    """Small tensors of one shape on their way to the host, each with what the host knows of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: list[tuple[EntryT, Tensor]] = []
        self._arriving: tuple[list[EntryT], Tensor, torch.cuda.Event | None] | None = None

    def add(self, entry: EntryT, values: Tensor) -> None:
        """Note a tensor on the device."""
        self._pending.append((entry, values))

    def flush(self, *, wait: bool) -> list[tuple[EntryT, Tensor]]:
        """What has arrived since the last call, on the host; starts the copy of what was added since.

        Args:
            wait: also wait for everything added so far; otherwise a GPU's last copy stays on its way.
        """
        arrived = self._collect()
        if self._pending:
            entries = [entry for entry, _ in self._pending]
            values = torch.stack([value for _, value in self._pending])
            event = None
            if self._device.type == "cuda":
                # Only pinned memory is copied to while the device works on.
                values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._arriving = (entries, values, event)
            self._pending = []
        if wait or self._device.type != "cuda":
            arrived += self._collect()
        return arrived

    def _collect(self) -> list[tuple[EntryT, Tensor]]:
        if self._arriving is None:
            return []
        entries, values, event = self._arriving
        self._arriving = None
        if event is not None:
            event.synchronize()
        return list(zip(entries, values, strict=True))


@dataclass
class _Entry:
    step: int
    tokens: int
    lr: float
    stopwatch: Stopwatch


class MetricsLog:
    """Rows of ``metrics.parquet``, in order of steps."""

    def __init__(self, device: torch.device, tokens_per_step: int, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows: list[dict[str, Any]] = list(rows or [])
        self._tokens_per_step = tokens_per_step
        self._arrivals: Arrivals[_Entry] = Arrivals(device)

    def add(self, step: int, lr: float, values: Tensor, stopwatch: Stopwatch) -> None:
        """Note one step.

        Args:
            step: steps done, this one included.
            lr: learning rate of the step.
            values: (3,) FP32 on the device: loss, gradient norm, 1 if the step was skipped.
            stopwatch: started and stopped around the step.
        """
        self._arrivals.add(_Entry(step, step * self._tokens_per_step, lr, stopwatch), values)

    def flush(self, *, wait: bool) -> None:
        """Move what has arrived into `rows`.

        Args:
            wait: also wait for everything added so far; otherwise a GPU's last copy stays on its way.
        """
        for entry, values in self._arrivals.flush(wait=wait):
            loss, grad_norm, skipped = values.tolist()
            milliseconds = entry.stopwatch.milliseconds()
            self.rows.append(
                {
                    "step": entry.step,
                    "tokens": entry.tokens,
                    "loss": loss,
                    "lr": entry.lr,
                    "grad_norm": grad_norm,
                    "step_ms": milliseconds,
                    "tokens_per_s": self._tokens_per_step / milliseconds * 1e3,
                    "skipped": bool(skipped),
                }
            )

    def table(self) -> pd.DataFrame:
        """All rows that have arrived."""
        return pd.DataFrame(self.rows, columns=list(COLUMN_TYPES)).astype(COLUMN_TYPES)
