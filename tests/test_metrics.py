"""Spikes are counted as OLMo 2 counts them, and logged values come back in order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.metrics import MetricsLog, Stopwatch
from fp8lab.spikes import judged_count, spike_score


def losses(count: int = 400) -> np.ndarray:
    return 3 + 0.05 * np.random.default_rng(0).standard_normal(count)


@given(st.sets(st.integers(150, 399), max_size=3))
def test_spike_score_is_the_share_of_spikes(spikes) -> None:
    values = losses()
    # Far apart in size: a spike in the window widens the deviation that the next is measured by.
    for rank, index in enumerate(sorted(spikes)):
        values[index] = 10.0 * 100**rank
    assert spike_score(pd.Series(values)) == pytest.approx(len(spikes) / 300)


def test_spike_score_of_short_constant_or_non_finite_curves_is_zero() -> None:
    assert spike_score(pd.Series([3.0, 900.0])) == 0
    assert spike_score(pd.Series([3.0] * 300)) == 0
    values = losses()
    values[200:210] = np.nan
    assert spike_score(pd.Series(values)) == 0


def test_rows_arrive_once_and_in_order() -> None:
    log = MetricsLog(torch.device("cpu"), tokens_per_step=64, rows=[])
    for step in range(1, 6):
        stopwatch = Stopwatch(torch.device("cpu")).start()
        stopwatch.stop()
        log.add(step, 0.1, torch.tensor([3.0 - step, 1.0, step == 4]), stopwatch)
        if step == 3:
            log.flush(wait=False)
            assert [row["step"] for row in log.rows] == [1, 2, 3]
    log.flush(wait=True)
    table = log.table()
    assert table["loss"].tolist() == [2.0, 1.0, 0.0, -1.0, -2.0]
    assert table["tokens"].tolist() == [64, 128, 192, 256, 320]
    assert table["skipped"].tolist() == [False, False, False, True, False]


def test_losses_are_judged_after_a_hundred_unless_they_are_not_finite() -> None:
    values = [3.0 + 0.01 * (step % 7) for step in range(250)]
    assert judged_count(pd.Series(values)) == 150
    assert judged_count(pd.Series(values[:100])) == 0
    values[200] = float("nan")
    assert judged_count(pd.Series(values)) == 149
