"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from fp8lab.training.averaging import WeightAverage

NOT_SKIPPED, SKIPPED = torch.tensor(False), torch.tensor(True)


def test_a_value_counts_half_after_the_half_life() -> None:
    weight = torch.zeros(3)
    average = WeightAverage({"w": weight}, half_life_steps=4)
    weight.fill_(1.0)
    for step in range(1000, 1004):
        average.update(step, NOT_SKIPPED)
    assert average.averages["w"].tolist() == pytest.approx([0.5] * 3)


def test_the_first_steps_count_alike() -> None:
    weight = torch.full((2,), 100.0)
    average = WeightAverage({"w": weight}, half_life_steps=50)
    for step in range(1, 6):
        weight.fill_(float(step))
        average.update(step, NOT_SKIPPED)
    assert average.averages["w"].tolist() == pytest.approx([3.0, 3.0])


def test_a_skipped_step_leaves_the_average_alone() -> None:
    weight = torch.zeros(2)
    average = WeightAverage({"w": weight}, half_life_steps=2)
    weight.fill_(1.0)
    average.update(100, NOT_SKIPPED)
    before = average.averages["w"].clone()
    average.update(101, SKIPPED)
    assert torch.equal(average.averages["w"], before)
