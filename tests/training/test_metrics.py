"""Spikes are counted as OLMo 2 counts them, and logged values come back in order."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.spikes import SpikeCount
from fp8lab.training.metrics import MetricsLog, Stopwatch


def count_spikes(values, bunch: int = 1000) -> SpikeCount:
    """The losses of steps 1, 2, ..., a bunch at a time; the count goes through JSON in between, as checkpoints do."""
    count = SpikeCount()
    for start in range(0, len(values), bunch):
        losses = list(values[start : start + bunch])
        count.add(range(start + 1, start + 1 + len(losses)), losses)
        count = SpikeCount(**json.loads(json.dumps(asdict(count))))
    return count


def losses(count: int = 400) -> np.ndarray:
    return 3 + 0.05 * np.random.default_rng(0).standard_normal(count)


@given(st.sets(st.integers(150, 399), max_size=3))
def test_spike_score_is_the_share_of_spikes(spikes) -> None:
    values = losses()
    # Far apart in size: a spike in the window widens the deviation that the next is measured by.
    for rank, index in enumerate(sorted(spikes)):
        values[index] = 10.0 * 100**rank
    count = count_spikes(values)
    assert (count.judged, count.spiked) == (300, len(spikes))
    assert count.score == pytest.approx(len(spikes) / 300)
    assert count.first_step == (min(spikes) + 1 if spikes else None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_spike_score_of_short_constant_or_non_finite_curves_is_zero(value: float) -> None:
    assert count_spikes([3.0, 900.0]).score == 0
    assert count_spikes([3.0] * 300).score == 0
    values = losses()
    values[200:210] = value
    count = count_spikes(values)
    assert (count.judged, count.score) == (290, 0)


@pytest.mark.parametrize("bunch", [17, 250])
def test_losses_that_come_in_bunches_are_judged_as_those_that_come_at_once(bunch) -> None:
    values = losses(1300)
    values[[120, 640, 1250]] = 30.0, 300.0, 3000.0
    values[700] = np.nan
    parts, whole = count_spikes(values, bunch), count_spikes(values, len(values))
    assert (parts.judged, parts.spiked, parts.first_step) == (whole.judged, whole.spiked, whole.first_step)
    assert (whole.judged, whole.spiked, whole.first_step) == (1199, 3, 121)


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
    assert count_spikes(values).judged == 150
    assert count_spikes(values[:100]).judged == 0
    values[200] = float("nan")
    assert count_spikes(values).judged == 149
