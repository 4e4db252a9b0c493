"""A GPU's time and state, as it reports them itself."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

WARMUP_CALLS = 3


@dataclass
class Telemetry:
    """Readings of the GPU while it works."""

    clocks_mhz: list[float] = field(default_factory=list)
    powers_w: list[float] = field(default_factory=list)

    def read(self) -> None:
        """Read SM clock and power once, where NVML's Python package (extra `gpu`) is installed."""
        # Whatever NVML objects to: a reading less must not end a measurement.
        with contextlib.suppress(Exception):
            self.clocks_mhz.append(torch.cuda.clock_rate())
            self.powers_w.append(torch.cuda.power_draw() / 1e3)

    @property
    def median_clock_mhz(self) -> float:
        """NaN where there were no readings."""
        return statistics.median(self.clocks_mhz) if self.clocks_mhz else float("nan")

    @property
    def median_power_w(self) -> float:
        """NaN where there were no readings."""
        return statistics.median(self.powers_w) if self.powers_w else float("nan")


def gpu_milliseconds(function: Callable[[], Any], calls: int, telemetry: Telemetry | None = None) -> float:
    """Median time of a call on the GPU, which is timed on its own clock.

    Args:
        function: queues work, and waits for nothing.
        calls: timed, after some that are not.
        telemetry: takes a reading while the calls run.
    """
    for _ in range(WARMUP_CALLS):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    if telemetry is not None:
        telemetry.read()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events))


def replayed(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """The GPU's work of so many calls, queued at once by each call of what is returned (a CUDA graph).

    The host takes tens of microseconds to launch a kernel: of shorter ones queued one by one, it is timed instead.

    Args:
        function: queues work, and waits for nothing.
        calls: in one graph, which itself takes the GPU a few microseconds to begin.
    """
    function()  # nothing may be compiled during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay
