"""Spikes of the loss, as OLMo 2 counts them (2501.00656)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

SPIKE_WINDOW = 1_000
SPIKE_STANDARD_DEVIATIONS = 7.0
SPIKE_MIN_HISTORY = 100
"""Losses to have seen before one can be called a spike."""


def spikes(losses: pd.Series) -> pd.Series:
    """Which of `losses` lie at least 7 standard deviations from the mean of the 1,000 before; NaN where not judged.

    The first 100 values, and non-finite ones, are not judged.
    """
    history = losses.where(np.isfinite(losses)).rolling(SPIKE_WINDOW, min_periods=SPIKE_MIN_HISTORY)
    mean, deviation = history.mean().shift(1), history.std().shift(1)
    distance = (losses - mean).abs()
    spiked = (distance > 0) & (distance >= SPIKE_STANDARD_DEVIATIONS * deviation)
    return spiked.astype(float).where(mean.notna() & np.isfinite(losses))


@dataclass
class SpikeCount:
    """Counts the spikes of a run over every step, from losses that come in bunches; JSON values only."""

    judged: int = 0
    """Steps whose loss could be judged."""
    spiked: int = 0
    first_step: int | None = None
    """Number of the first step that spiked."""
    recent: list[float] = field(default_factory=list)
    """The last losses, at most 1,000: what the next are judged by."""

    @property
    def score(self) -> float:
        """Share of spikes among the steps that could be judged; 0 where there are none."""
        return self.spiked / self.judged if self.judged else 0.0

    def add(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Judge the losses of the next `steps`, in order."""
        verdicts = spikes(pd.Series([*self.recent, *losses], dtype="float64")).iloc[len(self.recent) :]
        self.judged += int(verdicts.notna().sum())
        spiked = [step for step, verdict in zip(steps, verdicts, strict=True) if verdict == 1]
        self.spiked += len(spiked)
        if spiked and self.first_step is None:
            self.first_step = spiked[0]
        self.recent = [*self.recent, *losses][-SPIKE_WINDOW:]
