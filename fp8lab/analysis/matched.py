"""Speed at matched loss: what a difference in loss costs in tokens, against the speed that it buys.

Near the end of a training the loss falls with the logarithm of the tokens D, at a *slope*
``s = -dL / d ln D``: nats a token for every factor e in tokens. A recipe that ends ``gap`` nats above BF16 is
where BF16 was ``exp(gap / s)`` times fewer tokens earlier, so it needs that many times BF16's tokens for
BF16's loss. If it does ``r`` times BF16's tokens a second, it is there ``r * exp(-gap / s)`` times as fast:
the loss-matched speed-up. Where that is below 1, FP8 costs time.

All three are measured with an error, and the interval of what follows holds all three (MOVER, Zou and Donner 2008;
of the quotient gap / s, Donner and Zou 2012): each end moves by the root of the summed squares of what the parts move
it by. Where a slope comes from is `fp8lab.analysis.slopes`' business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8lab.analysis.comparison import Gap

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A number with the interval that its runs or rounds give it."""

    value: float
    interval: Interval | None = None
    """None where a single run, too few rounds or a slope without one give none."""

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
    interval: Interval | None = None
    """95%; None where nothing says how far it may be off."""

    def text(self) -> str:
        """'0.180 (0.150 to 0.210; decay branches)'."""
        spread = f"{self.interval[0]:.3f} to {self.interval[1]:.3f}; " if self.interval else ""
        return f"{self.nats:.3f} ({spread}{self.source})"


def token_factor(gap: float, slope: float) -> float:
    """Tokens for BF16's loss over BF16's tokens, of a recipe that ends `gap` nats above it."""
    return math.exp(gap / slope)


def token_factors(gap: Gap, slope: Slope) -> Estimate:
    """`token_factor` with the interval that gap and slope give it; None where either has none."""
    value = token_factor(gap.mean, slope.nats)
    if gap.interval is None or slope.interval is None or slope.interval[0] <= 0:
        return Estimate(value)
    low = _quotient_low(gap.mean, gap.interval, slope.nats, slope.interval)
    negated = (-gap.interval[1], -gap.interval[0])
    high = -_quotient_low(-gap.mean, negated, slope.nats, slope.interval)
    return Estimate(value, (math.exp(low), math.exp(high)))


def _quotient_low(top: float, top_interval: Interval, bottom: float, bottom_interval: Interval) -> float:
    """Lower end R of top / bottom, by MOVER: where the lower end of ``top - R * bottom`` is zero.

    Args:
        bottom: positive with all of its interval.
    """
    reach = top - top_interval[0]
    # Of R times bottom that end counts which lowers the difference: the upper one where R is positive.
    room = bottom - (bottom_interval[1] if top_interval[0] > 0 else bottom_interval[0])
    a, c = bottom**2 - room**2, top**2 - reach**2
    root = math.sqrt(max(0.0, (top * bottom) ** 2 - a * c))
    # Two forms of one root: the first divides by no difference that may vanish.
    return c / (top * bottom + root) if top * bottom + root > 0 and top >= 0 else (top * bottom - root) / a


def affordable_gap(ratio: float, slope: float) -> float:
    """The gap (nats) at which a recipe that does `ratio` times BF16's tokens a second gains nothing."""
    return slope * math.log(ratio)


def loss_matched(ratio: Estimate, gap: Gap, slope: Slope) -> Estimate:
    """The loss-matched speed-up.

    Args:
        ratio: tokens a second over BF16's.
        gap: loss minus BF16's.
        slope: of BF16's loss at the end.

    Returns:
        ``ratio * exp(-gap / slope)`` with an interval; without one where a part has none.
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
