"""Learning-rate schedules, as fractions of the peak.

Warm-up rises linearly to 1. Then either a cosine falls to the final fraction over the rest of the
run (Loshchilov & Hutter, 1608.03983), or the rate stays at 1 and falls linearly only over the last
part: warm-up, stable, decay (WSD; Hu et al., 2404.06395). The stable part of a WSD run does not
depend on how long the run will be, so several token budgets can branch off one run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The configuration of a decay branch needs these functions.
    from fp8lab.config import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Steps of the linear warm-up in a run of `steps`."""
    return round(schedule.warmup_fraction * steps)


def decay_start(schedule: ScheduleConfig, steps: int) -> int:
    """First step of WSD's linear decay in a run of `steps`."""
    return steps - max(1, round(schedule.decay_fraction * steps))


def learning_rate_fraction(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of `steps`, over the peak's.

    The first step's rate is above 0 and the last step's is `final_fraction`.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "cosine":
        progress = (step + 1 - warmup) / (steps - warmup)
        return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    start = decay_start(schedule, steps)
    progress = max(0.0, (step + 1 - start) / (steps - start))
    return 1 - (1 - schedule.final_fraction) * progress
