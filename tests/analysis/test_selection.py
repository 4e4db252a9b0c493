"""The shortest schedules are left out of a law that they do not follow, and no others."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.laws import Chinchilla, JointLaw
from fp8lab.analysis.scaling import fit_joint
from fp8lab.analysis.selection import SIGNIFICANCE, choices, long_enough, several_sizes

LAW = JointLaw(Chinchilla(E=1.25, A=120.0, B=250.0, alpha=0.29, beta=0.28), {"fused": 0.97})
SCATTER = Deviation(0.01, degrees=14)
SIZES = {"7M": 6.9e6, "13M": 12.8e6, "19M": 19.1e6, "28M": 28.1e6}
BATCH = 131072


def ladder(sizes: int = 4) -> pd.DataFrame:
    """Runs that lie on the law, with branches at 5 and 10 tokens a parameter."""
    rows = [
        (size, recipe, budget < 20, n, budget * n, int(budget * n / BATCH), float(LAW(n, budget * n, recipe)))
        for (size, n), recipe, budget in itertools.product(list(SIZES.items())[:sizes], ("bf16", "fused"), (5, 10, 20))
    ]
    return pd.DataFrame(rows, columns=["size", "recipe", "is_branch", "parameters", "tokens", "steps", "loss"])


def lifted(points: pd.DataFrame, below: int, by: float = 0.8) -> pd.DataFrame:
    """`points`, with schedules of fewer steps ending above the law, the shortest highest."""
    return points.assign(loss=points["loss"] + by * (points["steps"] < below) * points["steps"].min() / points["steps"])


def test_runs_that_follow_a_law_all_take_part() -> None:
    points = ladder()
    pd.testing.assert_frame_equal(long_enough(points, SCATTER), points)


@pytest.mark.parametrize("below", [300, 500, 600])
def test_short_schedules_above_the_law_are_left_out_and_the_law_is_found(below: int) -> None:
    points = lifted(ladder(), below)
    kept = long_enough(points, SCATTER)
    assert set(kept.index) == set(points.index[points["steps"] >= below])
    assert fit_joint(kept).bf16.beta == pytest.approx(LAW.bf16.beta, rel=0.05)
    assert abs(fit_joint(points).bf16.beta / LAW.bf16.beta - 1) > 0.1


def test_what_fp8_costs_decides_nothing() -> None:
    points = ladder()
    lifted_fp8 = lifted(points, 600).where(points["recipe"] == "fused", points)
    assert len(long_enough(lifted_fp8, SCATTER)) == len(points)
    short = lifted(points, 300)
    lifted_more = lifted(short, 600).where(points["recipe"] == "fused", short)
    assert set(long_enough(lifted_more, SCATTER).index) == set(long_enough(short, SCATTER).index)


def test_noise_of_seeds_rarely_makes_runs_leave() -> None:
    rng, points = np.random.default_rng(0), ladder()
    drawn = (points.assign(loss=points["loss"] + rng.normal(0, SCATTER.value, len(points))) for _ in range(40))
    left = [len(long_enough(these, SCATTER)) < len(points) for these in drawn]
    # One in twenty by design; six of forty would be one chance in thirty.
    assert sum(left) < 6


def test_without_repeated_seeds_nothing_tells_a_misfit() -> None:
    points = lifted(ladder(), 500)
    assert len(long_enough(points, None)) == len(points)
    assert {choice.p_of_fit for choice in choices(points, None)} == {None}


def test_where_no_choice_fits_all_take_part() -> None:
    points = ladder()
    points["loss"] += 0.3 * np.where(np.arange(len(points)) % 2, 1, -1)
    assert len(long_enough(points, SCATTER)) == len(points)


def test_every_choice_of_the_shortest_schedule_is_told_as_long_as_it_identifies_a_law() -> None:
    points = lifted(ladder(), 500)
    found = list(choices(points, SCATTER))
    steps = sorted(points["steps"].unique())
    assert [choice.steps for choice in found] == steps[: len(found)]
    assert [len(choice.kept) for choice in found] == [(points["steps"] >= choice.steps).sum() for choice in found]
    # The next choice would have no run of 7M, and three sizes identify no law.
    assert found[-1].steps == points.loc[points["size"] == "7M", "steps"].max()
    first = next(choice for choice in found if choice.p_of_fit is not None and choice.p_of_fit >= SIGNIFICANCE)
    pd.testing.assert_frame_equal(first.kept, long_enough(points, SCATTER))
    assert first.misfit is not None
    assert found[0].misfit is not None
    assert first.misfit < 1e-3 < found[0].misfit


def test_three_sizes_leave_no_choice() -> None:
    assert not list(choices(ladder(sizes=3), SCATTER))
    assert len(long_enough(ladder(sizes=3), SCATTER)) == 3 * 2 * 3


def test_the_misfit_is_that_of_bf16_by_degrees_of_freedom() -> None:
    points = ladder()
    noise = np.random.default_rng(1).normal(0, 0.02, len(points))
    noisy = points.assign(loss=points["loss"] + noise)
    first, quiet = (next(choices(noisy, Deviation(sd, degrees=14))) for sd in (0.02, 0.002))
    assert first.misfit == pytest.approx(0.02, rel=0.7)
    assert first.p_of_fit is not None
    assert quiet.p_of_fit is not None
    assert quiet.p_of_fit < 1e-3 < 0.05 < first.p_of_fit


def test_a_precision_takes_part_from_three_complete_sizes_on() -> None:
    points = ladder()
    gone = points[~((points["recipe"] == "fused") & ~points["is_branch"] & points["size"].isin(["19M", "28M"]))]
    assert set(several_sizes(gone)["recipe"]) == {"bf16"}
    gone = points[~((points["recipe"] == "fused") & ~points["is_branch"] & (points["size"] == "28M"))]
    # Branches of a size that has not ended its full length come along.
    assert len(several_sizes(gone)) == len(gone)
