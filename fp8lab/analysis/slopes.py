"""How fast a loss still falls when a training ends, and where one may know it from.

In this order: runs of the same size and recipe that ended, learning rate decayed, after fewer tokens (decay
branches); the law that our own ladder was fitted to, between its runs; a published law, between those of its.
Elsewhere the slope is unknown, and no law is asked outside what it was fitted to: at 138M tokens the published one
promises a slope of 0.80 where our own validation curves fall by less than half of that, and what a gap costs in tokens
would be told as half. A loss that rose or hardly fell has no slope to go by either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from fp8lab.analysis import scaling, selection
from fp8lab.analysis.comparison import Deviation, student_quantile
from fp8lab.analysis.laws import BESIROGLU, Chinchilla
from fp8lab.analysis.losses import final_losses
from fp8lab.analysis.matched import Slope
from fp8lab.analysis.runs import Run, RunSet, known_scatter, seed_deviation
from fp8lab.errors import UserError

FLATTEST = 0.01
"""Nats for every factor e in tokens: of a loss that may fall by less, no number of tokens makes up a gap."""
REFITS = 100
"""Of our own law, for the interval of its slope."""


@dataclass(frozen=True)
class FittedLaw:
    """A law of BF16's loss, and the runs that it was fitted to."""

    law: Chinchilla
    runs: tuple[tuple[float, float], ...]
    """Parameters and tokens of each, or of those between which all others lie; three at least, not on one line."""
    source: str
    draws: tuple[Chinchilla, ...] = ()
    """Refits, for the interval; without any the slope has none."""

    @cached_property
    def _sides(self) -> NDArray[np.float64]:
        """Of the convex hull of the runs in (log N, log D): normals outwards, and qhull's offsets."""
        return ConvexHull(np.log(self.runs)).equations

    def is_between(self, parameters: float, tokens: float) -> bool:
        """True inside the convex hull of the runs in (log N, log D), its edge to within a thousandth included."""
        return bool((self._sides @ [math.log(parameters), math.log(tokens), 1.0] <= 1e-3).all())

    def slope(self, parameters: float, tokens: float) -> Slope | None:
        """The slope at one size and length; None where the law's runs do not lie around it."""
        if not self.is_between(parameters, tokens):
            return None
        spread = scaling.interval([law_slope(law, tokens) for law in self.draws]) if self.draws else None
        return Slope(law_slope(self.law, tokens), self.source, spread)


PUBLISHED_LAW = FittedLaw(
    BESIROGLU, runs=((70e6, 5e9), (70e6, 500e9), (16e9, 5e9), (16e9, 500e9)), source="published law"
)
"""Fitted to runs of 70M to 16B parameters on 5B to 500B tokens (2203.15556; constants of 2404.10102)."""


def law_slope(law: Chinchilla, tokens: float) -> float:
    """The slope of ``L(N, D)`` at `tokens`: beta * B / D ** beta, whatever the size."""
    return law.beta * law.B / tokens**law.beta


def measured_slope(tokens: Sequence[float], losses: Sequence[float], noise: Deviation | None = None) -> Slope:
    """The slope at the largest of `tokens`, from the final losses of runs of one size and recipe.

    A parabola in ln D through three budgets or more, a line through two; runs of one budget count by their mean.

    Args:
        noise: of a final loss between seeds, for the interval. Branches share a part of their run's, which cancels in
            a slope: the interval is rather too wide than too narrow.

    Raises:
        UserError: fewer than two budgets.
    """
    budgets = sorted(set(tokens))
    if len(budgets) < 2:
        raise UserError("a slope needs runs that ended after different numbers of tokens")
    groups = [[y for x, y in zip(tokens, losses, strict=True) if x == budget] for budget in budgets]
    # Distances from the largest, so that the linear coefficient is the derivative there.
    distance = np.log(np.array(budgets) / budgets[-1])
    weights = -np.linalg.pinv(np.vander(distance, min(3, len(budgets))))[-2]
    nats = float(weights @ [np.mean(group) for group in groups])
    if noise is None:
        return Slope(nats, "decay branches")
    error = noise.value * math.sqrt(sum(w**2 / len(group) for w, group in zip(weights, groups, strict=True)))
    reach = student_quantile(noise.degrees) * error
    return Slope(nats, "decay branches", (nats - reach, nats + reach))


def ladder_law(sets: Sequence[RunSet]) -> FittedLaw | None:
    """The law of BF16's losses in the first of `sets` that can identify one and follows it; None where none does."""
    for runs in sets:
        if not runs.where(recipe="bf16"):
            continue
        noise = seed_deviation(sets, runs.runs[0])
        points = selection.following(selection.several_sizes(final_losses(runs)), noise)
        if points is None:
            continue
        bf16 = points[points["recipe"] == "bf16"]
        if scaling.unidentified(bf16["parameters"], bf16["tokens"]):
            continue
        law, draws = scaling.fit_with_draws(bf16, noise=noise.value if noise else 0.0, samples=REFITS)
        return FittedLaw(
            law.bf16,
            runs=tuple(zip(bf16["parameters"].astype(float), bf16["tokens"].astype(float), strict=True)),
            source=f"law of {runs.plan}",
            draws=tuple(drawn.bf16 for drawn in draws),
        )
    return None


def known_laws(sets: Sequence[RunSet]) -> list[FittedLaw]:
    """What may be asked for a slope, the nearest to our runs first."""
    own = ladder_law(sets)
    return [own, PUBLISHED_LAW] if own else [PUBLISHED_LAW]


def by_law(laws: Sequence[FittedLaw], parameters: float, tokens: float) -> Slope | None:
    """Of the first law whose runs lie around this size and length; None where none do."""
    return next((slope for law in laws if (slope := law.slope(parameters, tokens)) is not None), None)


def slope_at(sets: Sequence[RunSet], run: Run, laws: Sequence[FittedLaw]) -> Slope | None:
    """The slope of the loss at the end of `run`; None where it is unknown, or may be as flat as `FLATTEST`.

    Args:
        sets: plans that may hold decay branches of the run's size.
        laws: `known_laws`.
    """
    for runs in sets:
        ends = [end for end in (*runs.runs, *runs.branches) if (end.size, end.recipe) == (run.size, run.recipe)]
        tokens, losses = [end.record.tokens for end in ends], [end.validation_loss for end in ends]
        if len(set(tokens)) > 1 and max(tokens) == run.record.tokens:
            noise = known_scatter(sets, run)
            return _if_falling(measured_slope(tokens, losses, noise))
    return _if_falling(by_law(laws, run.parameters, run.record.tokens))


def _if_falling(slope: Slope | None) -> Slope | None:
    """None of a slope that is below `FLATTEST`, or whose interval reaches there."""
    if slope is None:
        return None
    lowest = slope.interval[0] if slope.interval else slope.nats
    return slope if lowest > FLATTEST else None
