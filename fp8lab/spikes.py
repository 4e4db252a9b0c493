"""Spikes of the loss, as OLMo 2 counts them (2501.00656)."""

from __future__ import annotations

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
    return spiked.astype(float).where(mean.notna() & losses.notna())


def spike_score(losses: pd.Series) -> float:
    """Share of spikes among the losses that can be judged; 0 where there are none."""
    judged = spikes(losses).dropna()
    return float(judged.mean()) if len(judged) else 0.0


def judged_count(losses: pd.Series) -> int:
    """How many of `losses` can be judged: of none, a spike score of 0 says nothing."""
    return int(spikes(losses).notna().sum())
