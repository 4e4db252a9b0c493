"""Fits recover known constants, and say when there is nothing to recover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.errors import UserError
from fp8lab.scaling import (
    BESIROGLU,
    bootstrap,
    fit_chinchilla,
    fit_power_law,
    predict_largest,
    refit,
    unidentified,
)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens that vary independently."""
    n, d = np.meshgrid(np.geomspace(5e6, 2e9, 6), np.geomspace(1e8, 4e10, 5))
    return n.ravel(), d.ravel()


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


def test_chinchilla_recovers_the_constants_of_noise_free_runs() -> None:
    n, d = grid()
    law = fit_chinchilla(n, d, BESIROGLU(n, d))
    relative_error = {name: abs(value / getattr(BESIROGLU, name) - 1) for name, value in vars(law).items()}
    assert max(relative_error["E"], relative_error["alpha"], relative_error["beta"]) < 0.01
    assert max(relative_error["A"], relative_error["B"]) < 0.2


def test_one_broken_run_hardly_moves_the_fit() -> None:
    n, d = grid()
    loss = BESIROGLU(n, d)
    loss[7] *= 1.5
    law = fit_chinchilla(n, d, loss)
    assert law.alpha == pytest.approx(BESIROGLU.alpha, rel=0.03)
    assert law.beta == pytest.approx(BESIROGLU.beta, rel=0.03)


def test_bootstrap_interval_covers_the_truth_and_widens_with_noise() -> None:
    n, d = grid()
    rng = np.random.default_rng(0)
    widths = []
    for noise in (0.001, 0.01):
        loss = BESIROGLU(n, d) * np.exp(rng.normal(0, noise, len(n)))
        law = fit_chinchilla(n, d, loss)
        draws = bootstrap(lambda *columns, law=law: refit(law, *columns), n, d, loss, samples=60)
        low, high = np.quantile(draws[:, 3], (0.005, 0.995))
        assert low < BESIROGLU.alpha < high
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_largest_size_is_predicted_from_the_smaller_ones() -> None:
    n = np.array([1e6, 2e6, 4e6, 8e6])
    held_out = predict_largest(n, 20 * n**-0.1 * np.array([1, 1, 1, 1.02]))
    assert held_out.fitted_sizes == 3
    assert held_out.error == pytest.approx(1 / 1.02 - 1, abs=1e-6)


def test_tokens_proportional_to_parameters_leave_the_exponents_unidentified() -> None:
    n = np.geomspace(1e6, 1e9, 8)
    assert any("α" in reason and "β" in reason for reason in unidentified(n, 20 * n))
    n, d = grid()
    assert unidentified(n, d) == []


def test_three_sizes_leave_no_room_for_five_constants() -> None:
    n = np.array([4e5, 9e5, 2e6])
    assert any("3 different pairs" in reason for reason in unidentified(n, 2 * n))
    with pytest.raises(UserError, match="five constants"):
        fit_chinchilla(n, 2 * n, [5.0, 4.8, 4.6])
    with pytest.raises(UserError, match="two sizes"):
        fit_power_law([1e6, 1e6], [4.0, 4.1])
    with pytest.raises(UserError, match="leaves 1"):
        predict_largest([1e6, 2e6], [4.0, 3.9])
