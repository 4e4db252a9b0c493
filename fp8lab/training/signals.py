"""SIGTERM and SIGINT as requests: a run stops after its step, with a checkpoint, instead of dying in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import distributed as dist


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the run is checkpointed and its record says so."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} after step {step}; the same command resumes")
        self.exit_code = 128 + signal_number


_collected: list[int] | None = None
"""What the outermost `stop_signals` has received."""


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one has its usual effect.

    Not under torchrun, which passes on what the rank may have received already, and kills what does not end.
    Inside another `stop_signals` it is that one's list: a signal too late to stop a run stops its series.
    """
    global _collected
    if _collected is not None or threading.current_thread() is not threading.main_thread():
        yield [] if _collected is None else _collected
        return
    received = _collected = []
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if dist.is_torchelastic_launched():
            return
        for other, handler in previous.items():
            signal.signal(other, handler)

    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        previous[stop_signal] = signal.signal(stop_signal, handle)
    try:
        yield received
    finally:
        _collected = None
        for number, handler in previous.items():
            signal.signal(number, handler)
