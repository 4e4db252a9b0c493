"""What runs that differ in seed can tell about a difference in loss.

Two recipes are trained on a number of seeds each, and their mean losses differ. How far that difference
can be trusted depends on the scatter between seeds alone:

- `Gap` is the difference with its 95% interval: Welch's, or that of paired differences where runs of the same seed
  are known to move together; and an equivalence test, since an interval that contains zero does not say that nothing
  is there. Whether seeds pair is decided once for a design, from other runs (`fp8lab.analysis.variance`): a gap that
  chose by its own correlation would pair where chance alone made its differences small, and its interval would hold
  the truth too rarely (8 uncorrelated pairs that pass the test: in 4 of 5 cases).
- `Deviation` is the scatter, pooled over groups of runs, with the interval that so few runs know it by.
- `Design` turns a scatter into what a reader plans with: the half-width that a number of pairs buys, and
  the pairs that a half-width costs.

Everything here is arithmetic on losses in nats a token; where they come from is `fp8lab.analysis.runs`' business.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from fp8lab.units import signed

LEVEL = 0.95
"""Of every interval."""
EQUIVALENCE_MARGIN = 0.01
"""Nats a token: two recipes whose difference is known to be smaller count as equivalent."""
TARGET_HALF_WIDTH = 0.005
"""Nats a token: what a claim about FP8's cost should be known to, since published costs are about that large."""
MOST_PAIRS = 100_000
"""`Design.pairs_needed` looks no further."""


@dataclass(frozen=True)
class Deviation:
    """A standard deviation, and the degrees of freedom that it is known from."""

    value: float
    degrees: int

    @classmethod
    def pooled(cls, groups: Iterable[Sequence[float]]) -> Deviation | None:
        """Of values around the mean of their own group; None where no group has two."""
        arrays = [np.asarray(group, dtype=float) for group in groups]
        degrees = sum(len(array) - 1 for array in arrays if len(array) > 1)
        if not degrees:
            return None
        squares = sum(float(((array - array.mean()) ** 2).sum()) for array in arrays if len(array) > 1)
        return cls(math.sqrt(squares / degrees), degrees)

    @property
    def factors(self) -> tuple[float, float]:
        """The interval relative to the value: 0.66 and 2.04 from eight runs, by the chi-square distribution."""
        tail = (1 - LEVEL) / 2
        low, high = stats.chi2.ppf([1 - tail, tail], self.degrees)
        return math.sqrt(self.degrees / low), math.sqrt(self.degrees / high)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, for values that scatter normally."""
        low, high = self.factors
        return self.value * low, self.value * high

    def reach(self, seeds: int = 1) -> float:
        """Half-width of a 95% interval of a difference between two means of `seeds` runs that scatter so."""
        return self.reach_of_mean([(seeds, seeds)])

    def reach_of_mean(self, runs: Sequence[tuple[int, int]]) -> float:
        """Half-width of a 95% interval of a mean of several such differences, each between so many runs and so many."""
        error = math.sqrt(sum(1 / ours + 1 / baseline for ours, baseline in runs)) / len(runs)
        return student_quantile(self.degrees) * self.value * error


@dataclass(frozen=True)
class Correlation:
    """Of two recipes' losses over the seeds that they share."""

    value: float
    pairs: int

    @classmethod
    def between(cls, ours: Sequence[float], baseline: Sequence[float]) -> Correlation | None:
        """None where there are fewer than four pairs, or one side does not vary."""
        if len(ours) < 4 or np.ptp(ours) == 0 or np.ptp(baseline) == 0:
            return None
        return cls(float(np.corrcoef(ours, baseline)[0, 1]), len(ours))

    @property
    def lower(self) -> float:
        """One-sided 95% lower bound, by Fisher's z."""
        value = min(max(self.value, -1 + 1e-12), 1 - 1e-12)
        return math.tanh(math.atanh(value) - stats.norm.ppf(LEVEL) / math.sqrt(self.pairs - 3))

    @property
    def is_measurable(self) -> bool:
        """True if the lower bound is above zero: pairs of later runs of this design then tell more than two groups."""
        return self.lower > 0


@dataclass(frozen=True)
class Gap:
    """A difference of mean losses: FP8 minus BF16, nats a token."""

    mean: float
    interval: tuple[float, float] | None
    """95%, Welch's unequal-variance t or, if `paired`, Student's over pairs; None unless both sides have two seeds."""
    seeds: int
    """Runs on the side that has fewer."""
    paired: bool = False
    """Whether the interval is that of differences between runs of the same seed."""
    correlation: Correlation | None = None
    """Between runs of the same seed, where enough are shared."""
    standard_error: float | None = None
    degrees: float | None = None
    """Degrees of freedom of the standard error."""
    baseline: float = math.nan
    """Mean loss of BF16's runs."""

    @classmethod
    def between(cls, ours: Sequence[float], baseline: Sequence[float]) -> Gap:
        """Of two groups of runs, whatever their seeds."""
        mean, seeds = float(np.mean(ours) - np.mean(baseline)), min(len(ours), len(baseline))
        level = float(np.mean(baseline))
        if seeds < 2:
            return cls(mean, None, seeds, baseline=level)
        shares = [float(np.var(group, ddof=1)) / len(group) for group in (ours, baseline)]
        error = math.sqrt(sum(shares))
        terms = sum(share**2 / (len(group) - 1) for share, group in zip(shares, (ours, baseline), strict=True))
        degrees = sum(shares) ** 2 / terms if terms else float(len(ours) + len(baseline) - 2)
        interval = _interval(mean, error, degrees)
        return cls(mean, interval, seeds, standard_error=error, degrees=degrees, baseline=level)

    @classmethod
    def by_seed(cls, ours: Mapping[int, float], baseline: Mapping[int, float], *, paired: bool = False) -> Gap:
        """Of losses by seed: Welch's, or of the differences at the seeds that both sides have.

        Args:
            paired: whether other runs of this design have shown that seeds move both sides alike. Ignored where fewer
                than two seeds are shared.
        """
        shared = [seed for seed in ours if seed in baseline]
        correlation = Correlation.between([ours[seed] for seed in shared], [baseline[seed] for seed in shared])
        if not paired or len(shared) < 2:
            gap = cls.between(list(ours.values()), list(baseline.values()))
            return replace(gap, correlation=correlation)
        differences = np.array([ours[seed] - baseline[seed] for seed in shared])
        mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
        degrees = len(differences) - 1
        interval = _interval(mean, error, degrees)
        level = float(np.mean([baseline[seed] for seed in shared]))
        return cls(mean, interval, len(differences), True, correlation, error, degrees, level)

    @property
    def half_width(self) -> float | None:
        """Half the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def excludes_zero(self) -> bool:
        """True if the interval leaves no doubt about the sign."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0

    def equivalence_p(self, margin: float = EQUIVALENCE_MARGIN) -> float | None:
        """p of two one-sided t tests (TOST: Schuirmann 1987) that the difference is at least `margin`, up or down.

        Below 0.05 the recipes count as equivalent; None without an interval.
        """
        if self.standard_error is None or self.degrees is None:
            return None
        room = margin - abs(self.mean)
        if self.standard_error == 0:
            return 0.0 if room > 0 else 1.0
        return float(stats.t.sf(room / self.standard_error, self.degrees))

    def difference_p(self, margin: float = EQUIVALENCE_MARGIN) -> float | None:
        """Two-sided p that the difference is no larger than `margin`: below 0.05 the 95% interval lies outside.

        None without an interval.
        """
        if self.standard_error is None or self.degrees is None:
            return None
        beyond = abs(self.mean) - margin
        if self.standard_error == 0:
            return 0.0 if beyond > 0 else 1.0
        return min(1.0, 2 * float(stats.t.sf(beyond / self.standard_error, self.degrees)))

    def assumed_interval(self, deviation: Deviation) -> tuple[float, float]:
        """95% of a gap whose own seeds tell nothing, if its runs scatter as `deviation` says."""
        reach = deviation.reach(self.seeds)
        return self.mean - reach, self.mean + reach

    def text(self, unit: str = "nats") -> str:
        """As prose has it: '+0.0041 nats (+0.0000 to +0.0082, 20 seeds)', '+0.0041 nats (one seed)'."""
        seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
        spread = f"{signed(self.interval[0])} to {signed(self.interval[1])}, {seeds}" if self.interval else seeds
        return f"{signed(self.mean)} {unit} ({spread})"

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Design:
    """A way to compare two recipes, and how much its runs scatter."""

    deviation: Deviation
    """Of runs around their recipe's mean or, if `paired`, of the differences between runs of the same seed."""
    paired: bool

    def half_width(self, pairs: float, deviation: float | None = None) -> float:
        """Half-width (nats a token) to expect of the 95% interval that `pairs` runs of each recipe give.

        Args:
            deviation: in place of the measured one, for example an end of its interval.
        """
        degrees = (pairs - 1) * (1 if self.paired else 2)
        error = (self.deviation.value if deviation is None else deviation) / math.sqrt(pairs)
        return float(student_quantile(degrees) * error * (1 if self.paired else math.sqrt(2)))

    def pairs_needed(self, half_width: float = TARGET_HALF_WIDTH, deviation: float | None = None) -> int:
        """Fewest pairs whose interval is expected to be no wider than plus or minus `half_width`."""
        low, high = 1, 2
        while self.half_width(high, deviation) > half_width:
            low, high = high, 2 * high
            if high > MOST_PAIRS:
                return MOST_PAIRS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.half_width(middle, deviation) > half_width else (low, middle)
        return high

    def pairs_range(self, half_width: float = TARGET_HALF_WIDTH) -> tuple[int, int]:
        """`pairs_needed` at both ends of the deviation's interval."""
        low, high = self.deviation.interval
        return self.pairs_needed(half_width, low), self.pairs_needed(half_width, high)


@functools.cache
def student_quantile(degrees: float) -> float:
    """Standard errors that an interval of 95% reaches to either side, by Student's distribution."""
    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


def _interval(mean: float, error: float, degrees: float) -> tuple[float, float]:
    reach = student_quantile(degrees) * error
    return mean - reach, mean + reach


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for having asked as many questions (Holm 1979), in their order.

    Rejecting where one is below 0.05 rejects any true hypothesis with a probability of at most 0.05.

    Raises:
        ValueError: one is NaN.
    """
    if any(math.isnan(p) for p in p_values):
        raise ValueError(f"a p value is NaN: {list(p_values)}")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
