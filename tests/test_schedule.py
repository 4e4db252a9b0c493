"""Schedules rise, hold and fall where they should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.config import ScheduleConfig
from fp8lab.schedule import decay_start, learning_rate_fraction, warmup_steps

schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "wsd"]),
    warmup_fraction=st.floats(0, 0.3),
    decay_fraction=st.floats(0.05, 0.5),
    final_fraction=st.floats(0, 1),
)


@given(schedule=schedules, steps=st.integers(10, 500))
def test_shape(schedule, steps) -> None:
    rates = [learning_rate_fraction(schedule, step, steps) for step in range(steps)]
    warmup = warmup_steps(schedule, steps)
    assert all(0 <= rate <= 1 + 1e-9 for rate in rates)
    assert rates[0] > 0 or schedule.final_fraction == 0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(schedule.final_fraction, abs=1e-9)
    if warmup:
        assert rates[warmup - 1] == 1


@given(steps=st.integers(100, 400), longer=st.integers(401, 900))
def test_wsd_is_flat_until_its_decay_so_that_budgets_can_share_it(steps, longer) -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_fraction=0.05, decay_fraction=0.2, final_fraction=0.0)
    for step in range(warmup_steps(schedule, longer), decay_start(schedule, steps)):
        assert learning_rate_fraction(schedule, step, steps) == learning_rate_fraction(schedule, step, longer) == 1


def test_cosine_is_halfway_in_the_middle() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.0, final_fraction=0.1)
    assert learning_rate_fraction(schedule, 49, 100) == pytest.approx(0.55)
