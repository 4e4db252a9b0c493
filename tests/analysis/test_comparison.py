"""Intervals, equivalence and the price of precision, against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fp8lab.analysis.comparison import Correlation, Design, Deviation, Gap, holm

losses = st.lists(st.floats(2, 4).map(lambda value: round(value, 4)), min_size=2, max_size=9).filter(
    lambda values: max(values) - min(values) > 1e-3
)


@given(losses, losses)
def test_groups_are_compared_as_scipy_does(ours: list[float], baseline: list[float]) -> None:
    gap = Gap.between(ours, baseline)
    result = stats.ttest_ind(ours, baseline, equal_var=False)
    assert gap.interval == pytest.approx(tuple(result.confidence_interval(0.95)))
    assert gap.degrees == pytest.approx(result.df)
    assert gap.excludes_zero == (result.pvalue < 0.05)


@given(losses, losses, st.floats(0.001, 1.0))
def test_equivalence_is_the_larger_of_two_one_sided_tests(
    ours: list[float], baseline: list[float], margin: float
) -> None:
    gap = Gap.between(ours, baseline)
    above = stats.ttest_ind(np.array(ours) + margin, baseline, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(np.array(ours) - margin, baseline, equal_var=False, alternative="less").pvalue
    assert gap.equivalence_p(margin) == pytest.approx(max(above, below))
    # The same as the 90% interval within the margin.
    low, high = stats.ttest_ind(ours, baseline, equal_var=False).confidence_interval(0.90)
    if abs(abs(low) - margin) > 1e-9 and abs(abs(high) - margin) > 1e-9:
        assert (gap.equivalence_p(margin) < 0.05) == (-margin < low and high < margin)  # type: ignore[operator]


def test_pairs_are_used_where_the_design_is_known_to_pair_and_nowhere_else() -> None:
    shared = np.random.default_rng(1).normal(0, 0.01, 8)
    baseline = {seed: 3 + shared[seed] for seed in range(8)}
    together = {seed: 3.005 + shared[seed] + 0.0005 * (-1) ** seed for seed in range(8)}
    gap = Gap.by_seed(together, baseline, paired=True)
    assert gap.paired
    expected = stats.ttest_rel(list(together.values()), list(baseline.values()))
    assert gap.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    # As correlated as seeds can be, and still no pairs: a gap does not choose by its own runs.
    other = Gap.by_seed(together, baseline)
    assert other.correlation is not None
    assert other.correlation.is_measurable
    assert not other.paired
    assert other.interval == Gap.between(list(together.values()), list(baseline.values())).interval
    assert other.half_width > 5 * gap.half_width  # type: ignore[operator]


@pytest.mark.parametrize("seeds", [4, 8])
def test_gaps_whose_seeds_happen_to_correlate_hold_the_truth_as_often_as_others(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    held = trials = 0
    while trials < 250:
        ours, baseline = rng.normal(3, 0.01, (2, seeds))
        gap = Gap.by_seed(dict(enumerate(ours)), dict(enumerate(baseline)))
        if gap.correlation is None or not gap.correlation.is_measurable:
            continue
        assert gap.interval is not None
        trials, held = trials + 1, held + (gap.interval[0] <= 0 <= gap.interval[1])
    assert held / trials > 0.91


def test_pairs_are_formed_by_seed_whatever_the_order_and_runs_without_partner_are_left_out() -> None:
    baseline = {seed: 3 + 0.01 * seed for seed in range(1, 7)}
    ours = {seed: baseline[seed] + 0.001 + 1e-5 * seed for seed in (6, 2, 4, 1, 5, 3)} | {99: 5.0}
    gap = Gap.by_seed(ours, baseline, paired=True)
    assert (gap.paired, gap.seeds) == (True, 6)
    assert gap.mean == pytest.approx(0.001 + 3.5e-5)
    assert not Gap.by_seed({1: 3.0}, {1: 3.1}, paired=True).paired


@given(losses, losses, st.floats(0.001, 1.0))
def test_a_difference_is_beyond_the_margin_where_the_interval_is(
    ours: list[float], baseline: list[float], margin: float
) -> None:
    gap = Gap.between(ours, baseline)
    assert gap.interval is not None
    p, distance = gap.difference_p(margin), max(gap.interval[0] - margin, -margin - gap.interval[1])
    assert p is not None
    if abs(distance) > 1e-9:
        assert (p < 0.05) == (distance > 0)
    assert Gap.by_seed({1: 3.0}, {1: 3.1}).difference_p(margin) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_adjusts_as_its_paper_says(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    ascending = sorted(p_values)
    steps = [(len(p_values) - rank) * p for rank, p in enumerate(ascending)]
    for p, value in zip(p_values, adjusted, strict=True):
        assert value == pytest.approx(min(1.0, max(steps[: ascending.index(p) + 1])))
        assert value >= p
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_few_pairs_or_constant_losses_have_no_correlation() -> None:
    assert Correlation.between([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None
    assert Correlation.between([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    # Eight pairs show a correlation of 0.63 and above; by Fisher's z its standard error is 1 / sqrt(5).
    assert Correlation(0.63, 8).is_measurable
    assert not Correlation(0.61, 8).is_measurable
    assert Correlation(0.5, 28).lower == pytest.approx(math.tanh(math.atanh(0.5) - 1.6449 / 5), abs=1e-4)


def test_one_seed_has_an_interval_only_by_assumption() -> None:
    gap = Gap.by_seed({1: 3.02}, {1: 3.00})
    assert gap.interval is None
    assert gap.equivalence_p() is None
    low, high = gap.assumed_interval(Deviation(0.008, 14))
    assert (low + high) / 2 == pytest.approx(0.02)
    assert high - low == pytest.approx(2 * 2.1448 * 0.008 * math.sqrt(2), rel=1e-4)


def test_a_deviation_is_pooled_within_groups_and_known_as_well_as_its_runs_allow() -> None:
    deviation = Deviation.pooled([[1.0, 3.0], [10.0, 12.0, 14.0], [100.0]])
    assert deviation is not None
    assert (deviation.value, deviation.degrees) == (pytest.approx(math.sqrt((2 + 8) / 3)), 3)
    assert Deviation.pooled([[1.0], [2.0]]) is None
    # From tables of the chi-square distribution: 16.013 and 1.690 at seven degrees.
    assert Deviation(1.0, 7).factors == pytest.approx((math.sqrt(7 / 16.013), math.sqrt(7 / 1.690)), abs=1e-3)


@given(st.floats(1e-4, 0.05), st.booleans(), st.floats(1e-3, 0.02))
def test_no_fewer_pairs_would_do(value: float, paired: bool, half_width: float) -> None:
    design = Design(Deviation(value, 7), paired)
    pairs = design.pairs_needed(half_width)
    assert design.half_width(pairs) <= half_width
    assert pairs == 2 or design.half_width(pairs - 1) > half_width
    low, high = design.pairs_range(half_width)
    assert low <= pairs <= high


def test_pairs_needed_agree_with_the_textbook() -> None:
    # sd 0.0125 of differences, as a probe found: 27 pairs for 0.005 (t of 26 degrees 2.0555).
    assert Design(Deviation(0.0125, 6), paired=True).pairs_needed(0.005) == 27
    assert Design(Deviation(0.0125, 6), paired=True).half_width(27) == pytest.approx(
        2.0555 * 0.0125 / math.sqrt(27), rel=1e-4
    )
    # Two groups with sd 0.008: 21 of each (t of 40 degrees 2.0211).
    assert Design(Deviation(0.008, 6), paired=False).pairs_needed(0.005) == 21
    assert Design(Deviation(0.008, 6), paired=False).half_width(21) == pytest.approx(
        2.0211 * 0.008 * math.sqrt(2 / 21), rel=1e-4
    )


def test_p_values_that_are_not_known_are_not_adjusted() -> None:
    with pytest.raises(ValueError, match="NaN"):
        holm([math.nan, 0.5])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = {"gap": 0, "deviation": 0}
    trials = 400
    for _ in range(trials):
        groups = rng.normal(3, 0.01, (2, 8))
        gap = Gap.by_seed(dict(enumerate(groups[0])), dict(enumerate(groups[1])))
        deviation = Deviation.pooled([list(group) for group in groups])
        assert gap.interval is not None
        assert deviation is not None
        held["gap"] += gap.interval[0] <= 0 <= gap.interval[1]
        held["deviation"] += deviation.interval[0] <= 0.01 <= deviation.interval[1]
    assert all(0.91 < count / trials < 0.985 for count in held.values()), held


def test_a_gap_in_prose_has_its_interval_and_its_seeds() -> None:
    gap = Gap(0.00412, (-0.00161, 0.01), 20)
    assert gap.text() == "+0.0041 nats (−0.0016 to +0.0100, 20 seeds)"
    assert Gap(-0.0041, None, 1).text("nats/token") == "−0.0041 nats/token (one seed)"


def test_a_gap_is_fp8_minus_bf16_with_welchs_interval() -> None:
    gap = Gap.between([3.02, 3.06, 3.04, 3.08], [3.00, 3.01])
    # Variances of the means 1.667e-4 and 0.25e-4; 3.717 degrees of freedom by Welch and Satterthwaite, t = 2.862.
    assert gap.mean == pytest.approx(0.045)
    half_width = 2.862 * (1.6667e-4 + 0.25e-4) ** 0.5
    assert gap.interval == pytest.approx((0.045 - half_width, 0.045 + half_width), abs=2e-5)
    assert gap.seeds == 2


def test_one_seed_has_no_interval() -> None:
    gap = Gap.between([3.02, 3.05], [3.00])
    assert gap.interval is None
    assert "one seed" in str(gap)
