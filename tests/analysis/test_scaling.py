"""Fits recover known constants, and say when there is nothing to recover."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp8lab.analysis.laws import BESIROGLU, HOFFMANN, KAPLAN, Budget, Chinchilla, JointLaw, published_loss
from fp8lab.analysis.scaling import (
    STEEPEST,
    bootstrap,
    fit_chinchilla,
    fit_joint,
    fit_power_law,
    fit_with_draws,
    frontier,
    interval,
    predict,
    predict_largest,
    unidentified,
)
from fp8lab.errors import UserError

LAW = Chinchilla(E=1.25, A=120.0, B=250.0, alpha=0.29, beta=0.28)
SHARES = {"tensorwise": 0.93, "fused": 0.97}
LADDER = np.array([6.9e6, 12.8e6, 19.1e6, 28.1e6, 48.5e6])


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens that vary independently."""
    n, d = np.meshgrid(np.geomspace(5e6, 2e9, 6), np.geomspace(1e8, 4e10, 5))
    return n.ravel(), d.ravel()


def ladder(law: JointLaw, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Five sizes in every precision of `law`, a stable run with branches each; half of the noise is the run's."""
    rng = np.random.default_rng(seed)
    rows = []
    for recipe in ("bf16", *law.multipliers):
        for n in LADDER:
            shared = rng.normal()
            for budget in (5, 10, 20):
                loss = float(law(n, budget * n, recipe)) + noise * float(shared + rng.normal()) / np.sqrt(2)
                rows.append((recipe, f"{n}-{recipe}", n, budget * n, loss))
    return pd.DataFrame(rows, columns=["recipe", "run", "parameters", "tokens", "loss"])


@given(
    exponent=st.floats(0.02, 0.8),
    scale=st.floats(1e6, 1e15),
    factor=st.floats(1.5, 50),
)
def test_power_law_recovers_its_constants(exponent: float, scale: float, factor: float) -> None:
    n = 1e6 * factor ** np.arange(4)
    law = fit_power_law(n, (scale / n) ** exponent)
    assert law.exponent == pytest.approx(exponent, rel=1e-6)
    assert law.scale == pytest.approx(scale, rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    E=st.floats(0.5, 2.5),
    A=st.floats(0.3, 3),
    B=st.floats(0.3, 3),
    alpha=st.floats(0.15, 0.6),
    beta=st.floats(0.15, 0.6),
)
def test_chinchilla_recovers_the_constants_of_noise_free_runs(
    E: float, A: float, B: float, alpha: float, beta: float
) -> None:
    n, d = grid()
    truth = Chinchilla(E, A * 1e8**alpha, B * 1e9**beta, alpha, beta)
    law = fit_chinchilla(n, d, truth(n, d))
    for name in ("E", "alpha", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=0.02), name
    assert law(1e10, 1e11) == pytest.approx(float(truth(1e10, 1e11)), rel=1e-3)


def test_one_broken_run_hardly_moves_the_fit() -> None:
    n, d = grid()
    loss = BESIROGLU(n, d)
    loss[7] *= 1.5
    law = fit_chinchilla(n, d, loss)
    assert law.alpha == pytest.approx(BESIROGLU.alpha, rel=0.03)
    assert law.beta == pytest.approx(BESIROGLU.beta, rel=0.03)


@settings(max_examples=10, deadline=None)
@given(
    on=st.sampled_from(["tokens", "parameters"]),
    shares=st.fixed_dictionaries({"tensorwise": st.floats(0.7, 1.2), "fused": st.floats(0.7, 1.2)}),
)
def test_the_joint_law_recovers_what_each_recipe_makes_of_its_budget(on: Budget, shares: dict[str, float]) -> None:
    law = fit_joint(ladder(JointLaw(LAW, shares, on)), on)
    assert law.multipliers == pytest.approx(shares, rel=1e-3)
    assert law.bf16.alpha == pytest.approx(LAW.alpha, rel=0.01)


@pytest.mark.parametrize("seed", [1, 2])
def test_intervals_of_a_noisy_ladder_hold_the_truth(seed: int) -> None:
    points = ladder(JointLaw(LAW, SHARES), noise=0.005, seed=seed)
    _, draws = fit_with_draws(points, noise=0.005, samples=50)
    for name in ("E", "alpha", "beta"):
        truth = getattr(LAW, name)
        low, high = interval([getattr(drawn.bf16, name) for drawn in draws], 0.99)
        assert low < truth < high, name
    for recipe, truth in SHARES.items():
        low, high = interval([drawn.multipliers[recipe] for drawn in draws], 0.99)
        assert low < truth < high < low + 0.12, recipe
    low, high = interval([float(drawn(1.5e9, 3e10)) for drawn in draws], 0.99)
    assert low < LAW(1.5e9, 3e10) < high


@pytest.mark.parametrize("sizes", [4, 5])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say_with_one_seed_a_size(sizes: int) -> None:
    truth, held = JointLaw(LAW, SHARES), []
    for seed in range(15):
        points = ladder(truth, noise=0.005, seed=seed)
        points = points[points["parameters"] <= LADDER[sizes - 1]]
        law = fit_joint(points, near=truth)
        draws = bootstrap(points, partial(fit_joint, near=law), noise=0.005, samples=40)
        for name in ("E", "alpha", "beta"):
            low, high = interval([getattr(drawn.bf16, name) for drawn in draws])
            held.append(low <= getattr(LAW, name) <= high)
        for recipe, share in SHARES.items():
            low, high = interval([drawn.multipliers[recipe] for drawn in draws])
            held.append(low <= share <= high)
    assert np.mean(held) >= 0.95


def test_refits_of_a_law_without_irreducible_loss_find_one_where_their_runs_have_it() -> None:
    points = ladder(JointLaw(LAW, {}), noise=0.005)
    from_many_starts = fit_joint(points)
    for irreducible in (1e-9, 0.0):
        nearly_none = JointLaw(Chinchilla(E=irreducible, A=18.0, B=40.0, alpha=0.14, beta=0.16), {})
        refitted = fit_joint(points, near=nearly_none)
        assert abs(refitted.bf16.E - from_many_starts.bf16.E) < 0.02


def test_a_size_that_stands_alone_makes_no_endless_exponent() -> None:
    points = ladder(JointLaw(replace(LAW, A=1e-9), {}))
    points.loc[points["parameters"] == LADDER[0], "loss"] += 0.2
    law = fit_joint(points)
    assert law.bf16.alpha == pytest.approx(STEEPEST)
    assert law.of(points) == pytest.approx(points["loss"].to_numpy(), abs=0.01)


def test_intervals_widen_with_the_noise_of_seeds() -> None:
    points = ladder(JointLaw(LAW, SHARES), noise=0.001)
    widths = []
    for noise in (0.0, 0.01):
        low, high = interval(
            [drawn.multipliers["fused"] for drawn in fit_with_draws(points, noise=noise, samples=25)[1]]
        )
        widths.append(high - low)
    assert widths[1] > 2 * widths[0] > 0


def test_a_run_and_its_branches_are_drawn_together_and_every_precision_keeps_its_number() -> None:
    points = ladder(JointLaw(LAW, SHARES))
    drawn = []

    def remember(rows: pd.DataFrame) -> JointLaw:
        drawn.append(rows)
        return JointLaw(LAW, SHARES)

    bootstrap(points, remember, samples=20)
    for rows in drawn:
        assert rows["recipe"].value_counts().to_dict() == points["recipe"].value_counts().to_dict()
        assert all(count % 3 == 0 for count in rows["run"].value_counts())
    assert len({tuple(rows["run"]) for rows in drawn}) > 10


def test_draws_that_cannot_be_fitted_are_counted_and_too_few_are_refused() -> None:
    points = ladder(JointLaw(LAW, SHARES))

    def fit_one_in(every: int) -> list[JointLaw]:
        calls = itertools.count(1)

        def fit(_: pd.DataFrame) -> JointLaw:
            if next(calls) % every:
                raise UserError("too few")
            return JointLaw(LAW, SHARES)

        return bootstrap(points, fit, samples=20)

    assert len(fit_one_in(5)) == 20
    assert len(fit_one_in(16)) == 12
    with pytest.raises(UserError, match="9 of 20 draws"):
        fit_one_in(21)


def test_larger_runs_are_predicted_within_an_interval() -> None:
    points = ladder(JointLaw(LAW, SHARES), noise=0.003, seed=5)
    top = points["parameters"] == LADDER[-1]
    law, draws = fit_with_draws(points[~top], noise=0.003, samples=60)
    predictions = predict(law, draws, points[~top], points[top], noise=0.003)
    assert len(predictions) == 9
    for prediction, measured in zip(predictions, points.loc[top, "loss"], strict=True):
        assert prediction.fitted_sizes == 4
        assert prediction.error == pytest.approx(prediction.predicted / measured - 1)
        assert prediction.interval is not None
        assert prediction.interval[0] < prediction.error < prediction.interval[1]
        assert abs(prediction.error) < 0.01


def test_largest_size_is_predicted_from_the_smaller_ones() -> None:
    n = np.array([1e6, 2e6, 4e6, 8e6])
    held_out = predict_largest(n, 20 * n**-0.1 * np.array([1, 1, 1, 1.02]))
    assert held_out.fitted_sizes == 3
    assert held_out.error == pytest.approx(1 / 1.02 - 1, abs=1e-6)


# Budgets that are apart in their logarithms; the examples are those whose logarithms are equal.
BUDGETS = st.tuples(st.floats(1e15, 1e18), st.floats(2, 6))


@given(st.lists(BUDGETS, min_size=1, max_size=30, unique_by=lambda run: np.log(run[0])))
@example([(1e15 + 1, 2.0), (1e15, 2.0)])
@example([(1e15, 3.0), (1e15 + 1, 3.0), (1e15 + 0.5, 2.0)])
def test_no_run_lies_below_the_frontier(runs: list[tuple[float, float]]) -> None:
    compute, loss = (np.array(values) for values in zip(*runs, strict=True))
    hull = frontier(compute, loss)
    assert loss[hull[-1]] == loss.min()
    assert hull[0] == compute.argmin()
    assert all(np.diff(compute[hull]) > 0)
    assert all(np.diff(loss[hull]) < 0)
    inside = compute <= compute[hull[-1]]
    line = np.interp(np.log(compute[inside]), np.log(compute[hull]), np.log(loss[hull]))
    assert all(np.log(loss[inside]) >= line - 1e-9)


def test_published_laws_give_the_losses_that_they_are_known_for() -> None:
    # 20 tokens a parameter: 125M, 350M and 1.5B by the refitted constants.
    n = np.array([125e6, 350e6, 1.5e9])
    assert BESIROGLU(n, 20 * n) == pytest.approx([3.314, 2.854, 2.434], abs=0.005)
    assert HOFFMANN.size_exponent == pytest.approx(0.45, abs=0.005)
    # Where tokens are no limit, L(N) = (N_c / N) ** alpha_N.
    assert KAPLAN(175e9, 1e18) == pytest.approx((6.4e13 / 175e9) ** 0.076, rel=1e-3)
    assert published_loss("Kaplan et al.", 2e8, 1e8, 1e10) == KAPLAN(1e8, 1e10)
    assert published_loss("Hoffmann et al.", 2e8, 1e8, 1e10) == HOFFMANN(2e8, 1e10)


def test_tokens_proportional_to_parameters_leave_the_exponents_unidentified() -> None:
    n = np.geomspace(1e6, 1e9, 8)
    assert any("α" in reason and "β" in reason for reason in unidentified(n, 20 * n))
    n, d = grid()
    assert unidentified(n, d) == []
    points = ladder(JointLaw(LAW, {}))
    assert unidentified(points["parameters"], points["tokens"]) == []


def test_as_many_tokens_for_every_size_leave_what_they_buy_unidentified() -> None:
    for spread in (0.0, 1e-4):
        (reason,) = unidentified(np.geomspace(1e6, 1e9, 8), 1e9 * (1 + spread * np.resize([0, 1], 8)))
        assert "as many tokens" in reason
    assert unidentified([], [])


def test_three_sizes_leave_no_room_for_five_constants() -> None:
    n = np.array([4e5, 9e5, 2e6])
    assert any("3 different pairs" in reason for reason in unidentified(n, 2 * n))
    with pytest.raises(UserError, match="five constants"):
        fit_chinchilla(n, 2 * n, [5.0, 4.8, 4.6])
    with pytest.raises(UserError, match="needs runs in bf16"):
        fit_joint(ladder(JointLaw(LAW, SHARES)).query("recipe != 'bf16'"))
    with pytest.raises(UserError, match="two sizes"):
        fit_power_law([1e6, 1e6], [4.0, 4.1])
    with pytest.raises(UserError, match="leaves 1"):
        predict_largest([1e6, 2e6], [4.0, 3.9])
