"""Scaling laws fitted to final losses, what they say of other runs, and what a set of runs cannot tell.

Chinchilla's law (`fp8lab.analysis.laws`) is fitted as by Hoffmann et al. (2203.15556, appendix D.2): the Huber loss of
log-loss residuals, *summed* over runs (averaging stops the optimiser early: Besiroglu et al., 2404.10102), log-sum-exp
for the three terms, L-BFGS from many starts. All precisions take part in one fit, each FP8 recipe with its share.

Intervals come from refits to runs drawn with replacement. A stable run and the branches that decay from it share most
of their training, so they are drawn together.

Runs with tokens in proportion to parameters, D = k N, trace a single curve in (N, D): any split of the loss between the
two terms fits it as well, so alpha and beta cannot be told apart however many runs there are. `unidentified` says so
instead of letting a fit look like knowledge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize, nnls

from fp8lab import flops
from fp8lab.analysis.laws import CONSTANTS, PUBLISHED, Budget, Chinchilla, Floats, JointLaw, PowerLaw, published_loss
from fp8lab.config import MODELS
from fp8lab.errors import UserError

HUBER_DELTA = 1e-3
"""Residuals in log loss beyond this count linearly."""
LEAST_SQUARES = float("inf")
"""As a `delta`: all residuals in log loss count quadratically."""
EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
"""Grid of starts for alpha and beta."""
KEPT_STARTS = 8
"""Best of the grid that the optimiser goes on from."""
KEPT_STARTS_NEAR = 2
"""Of the grid, beside a law that is known to be near. That law alone is not enough: where its E is next to nothing, so
is the slope of the objective in log E, and no refit would ever find an E again."""
FLATTEST, STEEPEST = 1e-6, 10.0
"""No alpha or beta beyond: a term so flat is part of E, one so steep the loss of the smallest model or shortest run."""


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


def fit_chinchilla(parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike) -> Chinchilla:
    """Approach 3 of 2203.15556 from a grid of starts; the best optimum.

    Args:
        parameters, tokens, loss: one entry a run (N, D, nats a token).

    Raises:
        UserError: fewer than five different pairs of N and D, the number of constants.
    """
    points = pd.DataFrame({"parameters": parameters, "tokens": tokens, "loss": loss, "recipe": "bf16"})
    return fit_joint(points).bf16


def fit_joint(
    points: pd.DataFrame, on: Budget = "tokens", near: JointLaw | None = None, delta: float = HUBER_DELTA
) -> JointLaw:
    """One law through the runs of all precisions, and the share of its budget that each FP8 recipe makes use of.

    Args:
        points: a row a final loss; columns parameters, tokens, loss (nats a token), recipe.
        on: which budget the share is of.
        near: start from this law and few others: for resampled runs, whose optimum is near.
        delta: residuals in log loss beyond this count linearly; none does with `LEAST_SQUARES`.

    Raises:
        UserError: fewer than five different pairs of N and D, the number of constants, or no run in BF16.
    """
    pairs = len(points[["parameters", "tokens"]].drop_duplicates())
    if pairs < CONSTANTS:
        raise UserError(f"Chinchilla's law has five constants and cannot be fitted to {pairs} runs")
    if "bf16" not in set(points["recipe"]):
        raise UserError("the precisions' joint law needs runs in bf16")
    recipes = [recipe for recipe in points["recipe"].unique() if recipe != "bf16"]
    is_recipe = (points["recipe"].to_numpy()[:, None] == np.array(recipes, dtype=object)).astype(float)
    log_n, log_d, log_loss = (np.log(points[name].to_numpy(float)) for name in ("parameters", "tokens", "loss"))
    # Around their means, so that a change of an exponent is not mostly a change of A or B.
    mean_n, mean_d = log_n.mean(), log_d.mean()
    log_n, log_d = log_n - mean_n, log_d - mean_d
    grid = _starts(log_n, log_d, log_loss)[: KEPT_STARTS if near is None else KEPT_STARTS_NEAR]
    starts = [np.append(start, np.zeros(len(recipes))) for start in grid]
    if near is not None:
        starts.insert(0, _start_at(near, recipes, mean_n, mean_d))
    objective = _huber(log_n, log_d, log_loss, is_recipe, on, delta)
    bounds = [(None, None)] * 3 + [(FLATTEST, STEEPEST)] * 2 + [(None, None)] * len(recipes)
    fits = [
        minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=TOLERANCES) for start in starts
    ]
    a, b, e, alpha, beta, *shares = min(fits, key=lambda fit: fit.fun).x
    law = Chinchilla(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * mean_n)),
        B=float(np.exp(b + beta * mean_d)),
        alpha=float(alpha),
        beta=float(beta),
    )
    return JointLaw(law, {recipe: float(np.exp(share)) for recipe, share in zip(recipes, shares, strict=True)}, on)


TOLERANCES = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9}


def _starts(log_n: Floats, log_d: Floats, log_loss: Floats) -> list[Floats]:
    """Starts of (log A, log B, log E, alpha, beta), best first: with the exponents given, A, B and E are linear."""
    loss = np.exp(log_loss)
    found = []
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        terms = np.stack([np.exp(-alpha * log_n), np.exp(-beta * log_d), np.ones_like(loss)], axis=1)
        factors, residual = nnls(terms / loss[:, None], np.ones_like(loss))
        # A term that least squares leaves out starts small: of zero there is no logarithm.
        found.append((residual, np.array([*np.log(np.maximum(factors, 1e-3)), alpha, beta])))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])]


def _start_at(law: JointLaw, recipes: Sequence[str], mean_n: float, mean_d: float) -> Floats:
    """A law as a start, for log N and log D around their means."""
    bf16 = law.bf16
    factors = [bf16.A, bf16.B, bf16.E, *(law.multipliers.get(recipe, 1.0) for recipe in recipes)]
    # Of zero, which a fit may underflow to, there is no logarithm.
    a, b, e, *shares = np.log(np.maximum(factors, np.finfo(float).tiny))
    return np.array([a - bf16.alpha * mean_n, b - bf16.beta * mean_d, e, bf16.alpha, bf16.beta, *shares])


def _huber(
    log_n: Floats, log_d: Floats, log_loss: Floats, is_recipe: Floats, on: Budget, delta: float
) -> Callable[[Floats], tuple[float, Floats]]:
    """Summed Huber loss and its gradient in (log A, log B, log E, alpha, beta, log share of each FP8 recipe)."""

    def objective(theta: Floats) -> tuple[float, Floats]:
        a, b, e, alpha, beta = theta[:5]
        shift = is_recipe @ theta[5:]
        n, d = (log_n + shift, log_d) if on == "parameters" else (log_n, log_d + shift)
        terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        highest = terms.max(axis=0)
        powers = np.exp(terms - highest)
        total = powers.sum(axis=0)
        residual = highest + np.log(total) - log_loss
        clipped = np.clip(residual, -delta, delta)
        of_n, of_d, of_e = clipped * powers / total
        of_shift = alpha * of_n if on == "parameters" else beta * of_d
        gradient = [of_n.sum(), of_d.sum(), of_e.sum(), -of_n @ n, -of_d @ d, *(-of_shift @ is_recipe)]
        # Residuals of 1e-3 make a sum of 1e-6: scaled up, so that the optimiser's tolerances do not end it.
        return float(clipped @ (residual - clipped / 2)) / HUBER_DELTA**2, np.array(gradient) / HUBER_DELTA**2

    return objective


def misfit(law: JointLaw, points: pd.DataFrame) -> float:
    """Standard deviation about a law of the losses that it was fitted to (nats a token), by degrees of freedom."""
    degrees = len(points) - CONSTANTS - len(law.multipliers)
    return math.sqrt(((points["loss"] - law.of(points)) ** 2).sum() / degrees)


def bootstrap(
    points: pd.DataFrame,
    fit: Callable[[pd.DataFrame], JointLaw],
    *,
    noise: float = 0.0,
    samples: int = 200,
    seed: int = 0,
) -> list[JointLaw]:
    """Refits to whole runs drawn with replacement, as many of each precision as there are, with their seeds' noise.

    Their intervals are conservative. Runs scatter about the law by their seeds' noise already, so that drawing them
    brings most of it in, and `noise` adds it again: of simulated ladders with a seed a size, more than 95% of the 95%
    intervals hold the truth.

    Args:
        points: as in `fit_joint`, with a column run: the stable run that a final loss belongs to. A run and its
            branches are drawn together.
        noise: standard deviation between seeds (nats a token), added to the drawn losses: half of its variance to a
            run and its branches alike, since they share their stable part, half to each apart.
        samples: refits. Draws that cannot be fitted (too few different runs) are drawn again, at most ten times as
            often as asked.

    Returns:
        As many as asked, or what so many draws gave.

    Raises:
        UserError: fewer than half of `samples` could be fitted: too few for the ends of an interval.
    """
    rng = np.random.default_rng(seed)
    rows = points.reset_index(drop=True)
    by_recipe = [
        [group.index.to_numpy() for _, group in of_recipe.groupby("run", sort=False)]
        for _, of_recipe in rows.groupby("recipe", sort=False)
    ]
    laws: list[JointLaw] = []
    for _ in range(10 * samples):
        runs = [runs[choice] for runs in by_recipe for choice in rng.integers(0, len(runs), len(runs))]
        shared = np.repeat(rng.normal(size=len(runs)), [len(run) for run in runs])
        drawn = rows.loc[np.concatenate(runs)]
        shift = noise * (shared + rng.normal(size=len(drawn))) / np.sqrt(2)
        try:
            laws.append(fit(drawn.assign(loss=drawn["loss"] + shift)))
        except UserError:
            continue
        if len(laws) == samples:
            break
    if len(laws) < samples / 2:
        raise UserError(f"{len(laws)} of {samples} draws of the runs can be fitted: too few runs for an interval")
    return laws


def fit_with_draws(
    points: pd.DataFrame, on: Budget = "tokens", *, noise: float = 0.0, samples: int = 200
) -> tuple[JointLaw, list[JointLaw]]:
    """`fit_joint`, and its refits to the runs that `bootstrap` draws."""
    law = fit_joint(points, on)
    draws = bootstrap(points, lambda drawn: fit_joint(drawn, on, near=law), noise=noise, samples=samples)
    return law, draws


def interval(draws: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the central interval of a quantity over the laws of a `bootstrap`."""
    low, high = band(draws, confidence)
    return float(low), float(high)


def band(draws: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """`interval` of each of several quantities, the laws along the first axis."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(draws, dtype=float), (tail, 1 - tail), axis=0)
    return low, high


@dataclass(frozen=True)
class HeldOut:
    """A law fitted to the smaller sizes and asked for a larger."""

    fitted_sizes: int
    predicted: float
    measured: float
    interval: tuple[float, float] | None = None
    """95% of `error`: of the prediction and of the measured run's own seed."""

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


def predict(
    law: JointLaw, draws: Sequence[JointLaw], fitted: pd.DataFrame, held_out: pd.DataFrame, noise: float, seed: int = 0
) -> list[HeldOut]:
    """What a law says of runs that it was not fitted to, one row of `held_out` after the other.

    Args:
        draws: refits of `law`'s runs by `bootstrap`.
        fitted: the runs that the law was fitted to.
        noise: standard deviation between seeds (nats a token).
    """
    sizes = fitted["parameters"].nunique()
    measured = held_out["loss"].to_numpy(float)
    predictions = np.array([drawn.of(held_out) for drawn in draws])
    predictions += noise * np.random.default_rng(seed).normal(size=predictions.shape)
    errors = predictions / measured - 1
    return [
        HeldOut(sizes, float(value), float(loss), interval(of_run))
        for value, loss, of_run in zip(law.of(held_out), measured, errors.T, strict=True)
    ]


def frontier(compute: ArrayLike, loss: ArrayLike) -> NDArray[np.intp]:
    """Which points lie on the lower convex hull of log loss against log compute, left to right, while it falls.

    No mixture of budgets that were measured does better than the lines between them.
    """
    compute, loss = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    x, y = np.log(compute), np.log(loss)
    hull: list[int] = []
    # Sorted before the logarithm, which makes neighbouring numbers equal.
    for point in np.lexsort((loss, compute)):
        if hull and loss[point] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _turns_down(x, y, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(int(point))
    return np.array(hull, dtype=np.intp)


def _turns_down(x: Floats, y: Floats, first: int, middle: int, last: int) -> bool:
    """True if `middle` lies on or above the line from `first` to `last`."""
    return bool((x[last] - x[first]) * (y[middle] - y[first]) >= (y[last] - y[first]) * (x[middle] - x[first]))


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
    if sizes > 1 and np.ptp(d) < 0.1:
        reasons.append(
            "all of them saw about as many tokens, so what tokens buy (B and β) cannot be told from what stays (E)"
        )
    elif sizes > 1 and abs(np.corrcoef(n, d)[0, 1]) > 0.995:
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


EXTRAPOLATED = ("48M", "125M", "250M", "350M", "1.5B")
"""The ladder's last size and those of the source article; of ours, those that are not measured yet are shown."""


def extrapolated(points: pd.DataFrame, law: JointLaw, draws: Sequence[JointLaw], budget: float) -> pd.DataFrame:
    """What a law says of sizes beyond those it was fitted to, in BF16: extrapolated, never measured.

    Args:
        points: what the law was fitted to, as `losses.final_losses` gives them.
        draws: refits, for the intervals.
        budget: tokens a parameter.

    Returns:
        A row a model, the largest measured one first. Columns: size, parameters, non_embedding, tokens, factor (N over
        the largest measured N), loss, low, high (95%, nats a token), drop, drop_low, drop_high (loss at the largest
        measured size minus loss here) and for each published law its own drop, under its name.
    """
    largest = points.iloc[int(points["parameters"].to_numpy().argmax())]
    counts = {name: flops.parameters(MODELS[name]) for name in EXTRAPOLATED}
    rows = [(str(largest["size"]), float(largest["parameters"]), float(largest["non_embedding"]))]
    rows += [
        (name, float(count.total), float(count.non_embedding))
        for name, count in counts.items()
        if count.total > largest["parameters"]
    ]
    table = pd.DataFrame(rows, columns=["size", "parameters", "non_embedding"])
    n = table["parameters"].to_numpy()
    table["tokens"], table["factor"] = budget * n, n / n[0]
    table["loss"] = law(n, budget * n)
    drawn = np.array([other(n, budget * n) for other in draws])
    table["low"], table["high"] = band(drawn)
    table["drop"] = table["loss"].iloc[0] - table["loss"]
    table["drop_low"], table["drop_high"] = band(drawn[:, :1] - drawn)
    for name in PUBLISHED:
        loss = published_loss(name, n, table["non_embedding"], table["tokens"])
        table[name] = loss[0] - loss
    return table
