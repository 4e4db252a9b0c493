"""Which GPUs each of several runs at once takes.

Runs with GPUs of their own share the machine's cores, memory and cooling, which a step that waits for its GPU
hardly notices, and a small model's may. With more runs at once than GPUs, some share a GPU: small models leave it
idle for part of the time, but their speeds are then not those of a run alone. Records say how many shared.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """What one of the runs at once has of the machine."""

    gpus: tuple[str, ...]
    """Identifiers as in `VARIABLE`; empty: whatever this process sees."""
    runs: int
    """Runs at once on these GPUs, this one included."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to see these GPUs and no others."""
        return {VARIABLE: ",".join(self.gpus)} if self.gpus else {}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as it would name them in `VARIABLE`."""
    # Takes seconds, and commands that start no runs do without.
    import torch

    named = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] or [str(index) for index in range(count)]


def shares(jobs: int, processes: int, gpus: Sequence[str]) -> list[Share]:
    """Hand out `gpus` to `jobs` runs at once of `processes` GPUs each: one `Share` a job.

    With fewer GPUs than one run takes, each sees them all, and says itself what it lacks.
    """
    groups = [tuple(gpus[start : start + processes]) for start in range(0, len(gpus) - processes + 1, processes)]
    if not groups:
        return [Share((), jobs)] * jobs
    taken = [groups[job % len(groups)] for job in range(jobs)]
    runs = Counter(taken)
    return [Share(group, runs[group]) for group in taken]
