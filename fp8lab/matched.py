"""Speed at matched loss: what a difference in loss costs in tokens, against the speed that it buys.

Near the end of a training the loss falls with the logarithm of the tokens D, at a *slope*
``s = -dL / d ln D``: nats a token for every factor e in tokens. A recipe that ends ``gap`` nats above BF16 is
where BF16 was ``exp(gap / s)`` times fewer tokens earlier, so it needs that many times BF16's tokens for
BF16's loss. If it does ``r`` times BF16's tokens a second, it is there ``r * exp(-gap / s)`` times as fast:
the loss-matched speed-up. Where that is below 1, FP8 costs time.

The slope comes from runs of the same size that ended, learning rate decayed, after fewer and after more
tokens (decay branches), and where there are none from a published law (`scaling.BESIROGLU`); its own
uncertainty is left out. Both speak of runs whose schedule is made for their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp8lab.comparison import Gap
from fp8lab.errors import UserError
from fp8lab.scaling import Chinchilla


@dataclass(frozen=True)
class Estimate:
    """A number with the interval that its runs or rounds give it."""

    value: float
    interval: tuple[float, float] | None = None
    """None where a single run or round gives none."""

    def text(self, digits: int = 2) -> str:
        """'1.44 (1.42 to 1.54)', or the number alone."""
        if self.interval is None:
            return f"{self.value:.{digits}f}"
        low, high = self.interval
        return f"{self.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})".replace("-", "−")


@dataclass(frozen=True)
class Slope:
    """How fast the loss still falls when a training ends."""

    nats: float
    """For every factor e in tokens."""
    source: str
    """What it rests on, for a reader: 'decay branches', 'published law'."""


def law_slope(law: Chinchilla, tokens: float) -> float:
    """The slope of ``L(N, D)`` at `tokens`: beta * B / D ** beta, whatever the size."""
    return law.beta * law.B / tokens**law.beta


def measured_slope(tokens: Sequence[float], losses: Sequence[float]) -> float:
    """The slope at the largest of `tokens`, from the final losses of runs of one size and recipe.

    A parabola in ln D through three budgets or more, a line through two; runs of one budget count by their mean.

    Raises:
        UserError: fewer than two budgets.
    """
    budgets = sorted(set(tokens))
    if len(budgets) < 2:
        raise UserError("a slope needs runs that ended after different numbers of tokens")
    means = [float(np.mean([y for x, y in zip(tokens, losses, strict=True) if x == budget])) for budget in budgets]
    # Distances from the largest, so that the linear coefficient is the derivative there.
    distance = np.log(np.array(budgets) / budgets[-1])
    return -float(np.polyfit(distance, means, min(2, len(budgets) - 1))[-2])


def token_factor(gap: float, slope: float) -> float:
    """Tokens for BF16's loss over BF16's tokens, of a recipe that ends `gap` nats above it."""
    return math.exp(gap / slope)


def token_factors(gap: Gap, slope: float) -> Estimate:
    """`token_factor` with the gap's interval."""
    interval = gap.interval and (token_factor(gap.interval[0], slope), token_factor(gap.interval[1], slope))
    return Estimate(token_factor(gap.mean, slope), interval)


def affordable_gap(ratio: float, slope: float) -> float:
    """The gap (nats) at which a recipe that does `ratio` times BF16's tokens a second gains nothing."""
    return slope * math.log(ratio)


def loss_matched(ratio: Estimate, gap: Gap, slope: float) -> Estimate:
    """The loss-matched speed-up.

    Args:
        ratio: tokens a second over BF16's.
        gap: loss minus BF16's.
        slope: nats for every factor e in tokens.

    Returns:
        ``ratio * exp(-gap / slope)``. Its interval combines those of ratio and gap, taken as independent, on the
        logarithm: each end moves by the root of the summed squares of what ratio and gap move it by (MOVER, Zou and
        Donner 2008: the delta method where the two sides of an interval differ). None where either has none.
    """
    tokens = token_factors(gap, slope)
    value = ratio.value / tokens.value
    if ratio.interval is None or tokens.interval is None:
        return Estimate(value)

    def distance(ratio_end: float, tokens_end: float) -> float:
        return math.hypot(math.log(ratio_end / ratio.value), math.log(tokens_end / tokens.value))

    low = value * math.exp(-distance(ratio.interval[0], tokens.interval[1]))
    high = value * math.exp(distance(ratio.interval[1], tokens.interval[0]))
    return Estimate(value, (low, high))
