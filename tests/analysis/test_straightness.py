"""A line through sizes: tests that hold their level where the noise is estimated from a few seeds."""

from __future__ import annotations

import numpy as np
import pytest

from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.straightness import Straightness, log_noise, straightness

SIZES = np.array([7e6, 13e6, 19e6, 28e6, 48e6])
NOISE = 0.004


def simulated(rng: np.random.Generator, irreducible: float, sizes: int, seeds: int) -> Straightness:
    """One ladder with a seed a size, but `seeds` of the smallest, from which the noise is estimated."""
    n = np.repeat(SIZES[:sizes], [seeds] + [1] * (sizes - 1))
    loss = irreducible + (3 - irreducible) * (n / SIZES[0]) ** -0.15
    losses = loss * np.exp(rng.normal(0, NOISE, len(n)))
    noise = log_noise([list(losses[:seeds])])
    assert noise is not None
    return straightness(list(n), list(losses), noise)


@pytest.mark.parametrize(("sizes", "seeds"), [(4, 2), (5, 4), (5, 20)])
def test_a_true_line_is_rejected_as_seldom_as_the_level_says_whatever_is_known_of_the_noise(
    sizes: int, seeds: int
) -> None:
    rng = np.random.default_rng(seeds)
    found = [simulated(rng, 0.0, sizes, seeds) for _ in range(1500)]
    assert np.mean([line.lack_of_fit_p < 0.01 for line in found]) == pytest.approx(0.01, abs=0.008)
    assert np.mean([line.bend_interval[0] <= 0 <= line.bend_interval[1] for line in found]) == pytest.approx(
        0.95, abs=0.02
    )


def test_the_bend_of_an_irreducible_loss_is_seen_only_with_little_noise() -> None:
    rng = np.random.default_rng(1)
    known = straightness(list(SIZES), list(1.5 + 1.5 * (SIZES / 7e6) ** -0.15), Deviation(1e-6, 20))
    assert known.lack_of_fit_p < 1e-3
    # The exponent of 1.5 + 1.5 (N / 7M)**-0.15 is 0.075 at 7M and 0.064 at 48M.
    assert known.bend == pytest.approx(-0.15, abs=0.02)
    noisy = [simulated(rng, 1.5, 5, 3) for _ in range(200)]
    assert np.mean([max(map(abs, line.bend_interval)) < 0.1 for line in noisy]) < 0.01
    straight = straightness(list(SIZES), list(3 * (SIZES / 7e6) ** -0.15), Deviation(1e-4, 20))
    assert max(map(abs, straight.bend_interval)) < 0.01


def test_seeds_of_one_size_count_by_their_mean_and_make_no_points() -> None:
    losses = list(3 * (SIZES / 7e6) ** -0.15)
    noise = Deviation(0.004, 8)
    alone = straightness(list(SIZES), losses, noise)
    doubled = straightness([*SIZES, SIZES[0]], [*losses, losses[0]], noise)
    assert alone.bend == pytest.approx(doubled.bend, abs=1e-9)
    assert (alone.lack_of_fit_p, doubled.lack_of_fit_p) == (pytest.approx(1.0), pytest.approx(1.0))
    assert log_noise([[3.0], [2.9]]) is None
