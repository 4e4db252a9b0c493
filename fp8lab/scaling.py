"""Scaling laws: fits of final loss against size and tokens, and what a set of runs cannot tell.

Two forms. Kaplan's power law (2001.08361, eqs. 1.1 and 1.2)::

    L(N) = (N_c / N) ** alpha

and Chinchilla's (Hoffmann et al., 2203.15556, approach 3)::

    L(N, D) = E + A / N ** alpha + B / D ** beta

fitted as there (appendix D.2): the Huber loss of log-loss residuals, *summed* over runs (averaging
stops the optimiser early: Besiroglu et al., 2404.10102), log-sum-exp for the three terms, BFGS from
a grid of starts. Intervals come from resampling runs.

Runs with tokens in proportion to parameters, D = k N, trace a single curve in (N, D): any split of
the loss between the two terms fits it as well, so alpha and beta cannot be told apart however many
runs there are. `unidentified` says so instead of letting a fit look like knowledge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from fp8lab.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = (scale / x) ** exponent: no irreducible loss."""

    scale: float
    exponent: float

    def __call__(self, x: ArrayLike) -> Floats:
        return (self.scale / np.asarray(x, dtype=float)) ** self.exponent


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N ** alpha + B / D ** beta, in nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def tokens_to_reach(self, parameters: float, loss: float) -> float:
        """Tokens that a model of this size needs for this loss; infinite where it cannot reach it."""
        left = loss - self.E - self.A / parameters**self.alpha
        return float((self.B / left) ** (1 / self.beta)) if left > 0 else float("inf")


HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""The constants of 2203.15556."""
BESIROGLU = Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""The same data fitted again (2404.10102)."""


def fit_power_law(x: ArrayLike, loss: ArrayLike) -> PowerLaw:
    """Least squares of log loss on log x.

    Raises:
        UserError: fewer than two different x.
    """
    x, loss = np.asarray(x, dtype=float), np.asarray(loss, dtype=float)
    if len(np.unique(x)) < 2:
        raise UserError("a power law needs runs of at least two sizes")
    slope, intercept = np.polyfit(np.log(x), np.log(loss), 1)
    return PowerLaw(scale=float(np.exp(-intercept / slope)), exponent=float(-slope))


def fit_chinchilla(parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, huber_delta: float = 1e-3) -> Chinchilla:
    """Approach 3 of 2203.15556 from a grid of starts; the best optimum.

    Args:
        parameters, tokens, loss: one entry a run (N, D, nats a token).
        huber_delta: residuals in log loss beyond this count linearly.

    Raises:
        UserError: fewer than five runs, the number of constants.
    """
    n, d, loss = (np.asarray(values, dtype=float) for values in (parameters, tokens, loss))
    if len(loss) < 5:
        raise UserError(f"Chinchilla's law has five constants and cannot be fitted to {len(loss)} runs")
    starts = itertools.product((0.0, 8.0, 16.0), (0.0, 8.0, 16.0), (-1.0, 0.0, 1.0), (0.2, 0.8), (0.2, 0.8))
    return _best_fit(n, d, loss, huber_delta, [np.array(start) for start in starts])


def _best_fit(n: Floats, d: Floats, loss: Floats, delta: float, starts: list[Floats]) -> Chinchilla:
    log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)

    def objective(theta: Floats) -> tuple[float, Floats]:
        """Summed Huber loss and its gradient in (a, b, e, alpha, beta) = (log A, log B, log E, alpha, beta)."""
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        predicted = logsumexp(terms, axis=0)
        residual = predicted - log_loss
        clipped = np.clip(residual, -delta, delta)
        value = np.sum(clipped * (residual - clipped / 2))
        share = np.exp(terms - predicted)
        weighted = clipped * share
        gradient = np.array(
            [
                weighted[0].sum(),
                weighted[1].sum(),
                weighted[2].sum(),
                -(weighted[0] * log_n).sum(),
                -(weighted[1] * log_d).sum(),
            ]
        )
        # Residuals of 1e-3 make a sum of 1e-6: scaled up, so that the optimiser's tolerances do not end it.
        return float(value) / delta**2, gradient / delta**2

    fits = [minimize(objective, start, jac=True, method="BFGS", options={"maxiter": 2000}) for start in starts]
    a, b, e, alpha, beta = min(fits, key=lambda fit: fit.fun).x
    return Chinchilla(E=float(np.exp(e)), A=float(np.exp(a)), B=float(np.exp(b)), alpha=float(alpha), beta=float(beta))


def refit(law: Chinchilla, parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike) -> Chinchilla:
    """`fit_chinchilla` started from `law` alone: for resampled runs, whose optimum is near."""
    start = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
    n, d, loss = (np.asarray(values, dtype=float) for values in (parameters, tokens, loss))
    return _best_fit(n, d, loss, 1e-3, [start])


def bootstrap(
    fit: Callable[..., PowerLaw | Chinchilla], *columns: ArrayLike, samples: int = 200, seed: int = 0
) -> Floats:
    """Refit to runs drawn with replacement.

    Args:
        fit: function of `columns` that returns a law.
        columns: one entry a run each: N, loss or N, D, loss.

    Returns:
        (samples, constants): the constants of each refit, in the order of the law's fields. Draws that
        cannot be fitted (too few different runs) are drawn again, at most ten times as often as asked.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(column, dtype=float) for column in columns]
    count = len(arrays[0])
    draws: list[tuple[float, ...]] = []
    for _ in range(10 * samples):
        chosen = rng.integers(0, count, count)
        try:
            draws.append(astuple(fit(*(array[chosen] for array in arrays))))
        except UserError:
            continue
        if len(draws) == samples:
            break
    return np.array(draws)


def interval(draws: Floats, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper ends of the central interval of each constant over `bootstrap` draws."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0)
    return low, high


@dataclass(frozen=True)
class HeldOut:
    """A law fitted to the smaller sizes and asked for the largest."""

    fitted_sizes: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Signed, relative: positive where the law promised more loss than there is."""
        return (self.predicted - self.measured) / self.measured


def predict_largest(parameters: ArrayLike, loss: ArrayLike) -> HeldOut:
    """Fit a power law to all sizes but the largest and predict the largest's mean loss.

    Raises:
        UserError: fewer than three sizes.
    """
    n, loss = np.asarray(parameters, dtype=float), np.asarray(loss, dtype=float)
    smaller = n < n.max()
    sizes = len(np.unique(n[smaller]))
    if sizes < 2:
        raise UserError(f"holding out the largest size leaves {sizes}; a power law needs two")
    law = fit_power_law(n[smaller], loss[smaller])
    return HeldOut(sizes, float(law(n.max())), float(loss[~smaller].mean()))


def unidentified(parameters: ArrayLike, tokens: ArrayLike) -> list[str]:
    """What runs at these (N, D) cannot determine, in sentences; empty where nothing stands in the way."""
    n, d = np.log(np.asarray(parameters, dtype=float)), np.log(np.asarray(tokens, dtype=float))
    points = len({(round(x, 6), round(y, 6)) for x, y in zip(n, d, strict=True)})
    sizes = len(np.unique(np.round(n, 6)))
    reasons = []
    if points <= 5:
        reasons.append(
            f"{points} different pairs of size and tokens cannot determine the five constants of "
            "L = E + A/N^α + B/D^β: such a fit would pass through every point and prove nothing"
        )
    if sizes > 1 and np.std(d) > 0 and abs(np.corrcoef(n, d)[0, 1]) > 0.995:
        reasons.append(
            "tokens grow in proportion to parameters, so the exponents of size (α) and of tokens (β) "
            "cannot be told apart: only their joint effect along this line is measured"
        )
    if sizes <= 3:
        reasons.append(
            f"a power law through {sizes} sizes leaves {max(sizes - 2, 0)} degree{'' if sizes == 3 else 's'} of "
            "freedom: its fit has no meaningful R², and an irreducible loss E cannot be separated from the slope"
        )
    return reasons
