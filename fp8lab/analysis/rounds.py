"""A ratio of two speeds from rounds that alternate in one process: one estimate, and what it can carry.

A GPU at its power limit lowers its clock while it warms up, and FP8 loses more of its speed by that than BF16, so the
first rounds flatter FP8. They are left out: of an occasion the *settled* rounds count, its last half and at least
three. The estimate is the geometric mean of their ratios, and its 95% interval is Student's on their logarithms. Fewer
than three rounds have no interval, since two agree by luck too often. Rounds of an occasion that moved by more than
`DRIFT` from its first to its last may not have settled; the interval then reaches to the last one at least.

Several occasions are taken together as the geometric mean of their estimates, with an interval from the lowest to the
highest of theirs: rounds say how far rounds scatter, only another occasion says how far occasions do. One with too few
rounds for an interval is left out of both, and confirms nothing. Processes that run at the same time, each on a GPU of
its own, are one occasion (`apart`): what disturbs one may disturb them all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fp8lab.analysis.comparison import student_quantile

Side = Literal["above", "below", "undecided"]

MIN_ROUNDS = 3
"""Fewest rounds of an occasion that give an interval."""
DRIFT = 0.03
"""Relative change of the ratio from the first round to the last, beyond which rounds may not have settled."""
MIN_OCCASIONS = 2
"""Fewest occasions that confirm a claim about speed."""


@dataclass(frozen=True)
class Occasion:
    """The ratios of one process's rounds, in their order."""

    ratios: tuple[float, ...]

    @property
    def settled(self) -> tuple[float, ...]:
        """The rounds that count."""
        return self.ratios[-settled_count(len(self.ratios)) :]

    @functools.cached_property
    def value(self) -> float:
        """Geometric mean of the settled rounds."""
        return float(np.exp(np.mean(np.log(self.settled))))

    @functools.cached_property
    def interval(self) -> tuple[float, float] | None:
        """95%; None of fewer than `MIN_ROUNDS` rounds."""
        logs = np.log(self.settled)
        if len(logs) < MIN_ROUNDS:
            return None
        reach = student_quantile(len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
        low, high = self.value * math.exp(-reach), self.value * math.exp(reach)
        return (min(low, self.ratios[-1]), max(high, self.ratios[-1])) if self.is_drifting else (low, high)

    @property
    def drift(self) -> float:
        """Relative change from the first round to the last."""
        return self.ratios[-1] / self.ratios[0] - 1

    @property
    def is_drifting(self) -> bool:
        return abs(self.drift) > DRIFT


def settled_count(rounds: int) -> int:
    """How many of so many rounds count, the last ones: half of them, and at least `MIN_ROUNDS`."""
    return max(MIN_ROUNDS, math.ceil(rounds / 2))


@dataclass(frozen=True)
class SpeedRatio:
    """One ratio from one occasion or several."""

    occasions: tuple[Occasion, ...]

    @property
    def value(self) -> float:
        return float(np.exp(np.mean([math.log(occasion.value) for occasion in self.counted])))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, from the lowest to the highest of the occasions' own; None where none has one."""
        known = [occasion.interval for occasion in self.conclusive if occasion.interval is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None

    @property
    def furthest(self) -> Occasion:
        """The counted occasion that drifted most."""
        return max(self.counted, key=lambda occasion: abs(occasion.drift))

    @property
    def conclusive(self) -> Sequence[Occasion]:
        """Occasions with rounds enough for an interval: one confirms another only then."""
        return [occasion for occasion in self.occasions if occasion.interval is not None]

    @property
    def counted(self) -> Sequence[Occasion]:
        """The occasions that the value is of: the conclusive ones, or all where there is none."""
        return self.conclusive or self.occasions


def apart(spans: Iterable[tuple[str, str]]) -> int:
    """How many of these times do not overlap, those that do counting as one.

    Args:
        spans: beginning and end of each, UTC in ISO 8601.
    """
    count, last = 0, ""
    for begin, end in sorted(spans):
        count += begin > last
        last = max(last, end)
    return count


def side(low: float, high: float, of: float = 1.0) -> Side:
    """On which side of a number an interval lies; 'undecided' where it holds the number, or is none (NaN)."""
    return "above" if low > of else "below" if high < of else "undecided"
