"""Which final losses a scaling law is fitted to.

A power law describes a loss after its first fall. A schedule of a few hundred steps may end inside that fall, which is
so steep that one such run can set the exponent of tokens by itself. So the shortest schedules are left out, one length
after the other, until BF16's losses lie no farther from a law of their own than seeds alone would put them. FP8's have
no say: what it costs is the question, and runs that it costs most must not leave for that reason.

The test decides, it does not measure. The scatter between seeds is known at the smallest size and full length, and
taken to be the same everywhere; a run and its branches share most of their training, so they scatter less apart. A
dozen losses less five constants leave it little power: that it does not reject is no proof of a law. `choices` tells
how much hangs on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from scipy import stats

from fp8lab.analysis import scaling
from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.laws import CONSTANTS, JointLaw

FEWEST_SIZES = 3
"""Of a precision that takes part in a law."""
SIGNIFICANCE = 0.05
"""Seeds do not explain how far losses lie from a law if they alone would put them so far less often than this."""


@dataclass(frozen=True)
class Choice:
    """The schedules from some length on."""

    kept: pd.DataFrame
    misfit: float | None
    """Of BF16 alone: standard deviation of its losses about their least-squares law (nats a token); None where there
    are no more losses than constants."""
    p_of_fit: float | None
    """How likely seeds alone make a misfit at least as large; None where it or their scatter is unknown."""

    @property
    def steps(self) -> int:
        """Of the shortest schedule that takes part."""
        return int(self.kept["steps"].min())

    @property
    def is_rejected(self) -> bool:
        """True if seeds do not explain the misfit."""
        return self.p_of_fit is not None and self.p_of_fit < SIGNIFICANCE

    def is_of(self, points: pd.DataFrame) -> bool:
        """True if these are the rows that it keeps: of choices, each keeps fewer than the one before."""
        return len(self.kept) == len(points)

    @cached_property
    def law(self) -> JointLaw:
        """The joint law through them. No part of choosing, so it is fitted where it is shown."""
        return scaling.fit_joint(self.kept)


def several_sizes(points: pd.DataFrame) -> pd.DataFrame:
    """Rows of `losses.final_losses` in the precisions that ran their full length at `FEWEST_SIZES` or more."""
    sizes = points[~points["is_branch"]].groupby("recipe")["size"].nunique()
    return points[points["recipe"].map(sizes) >= FEWEST_SIZES]


def following(points: pd.DataFrame, scatter: Deviation | None) -> pd.DataFrame | None:
    """`points` without the shortest schedules, as few of them as leave BF16 a law that fits; None where none does.

    All of them where nothing can be tested: BF16 identifies no law, or the scatter is unknown.

    Args:
        points: as `losses.final_losses` gives them, BF16 among them.
        scatter: of final losses between seeds (nats a token); without it nothing tells a misfit, and all are kept.
    """
    some_rejected = False
    for choice in choices(points, scatter):
        if choice.p_of_fit is not None and not choice.is_rejected:
            return choice.kept
        some_rejected |= choice.is_rejected
    return None if some_rejected else points


def long_enough(points: pd.DataFrame, scatter: Deviation | None) -> pd.DataFrame:
    """What is `following` a law; all of `points` where nothing does, so that the misfit shows."""
    kept = following(points, scatter)
    return points if kept is None else kept


def choices(points: pd.DataFrame, scatter: Deviation | None) -> Iterator[Choice]:
    """Every choice of the shortest schedule that takes part, as long as what is left of BF16 identifies a law."""
    for steps in sorted(points["steps"].unique()):
        kept = points[points["steps"] >= steps]
        bf16 = kept[kept["recipe"] == "bf16"]
        if scaling.unidentified(bf16["parameters"], bf16["tokens"]):
            break
        misfit = _misfit(bf16)
        p_of_fit = None
        if misfit is not None and scatter is not None:
            p_of_fit = float(stats.f.sf((misfit / scatter.value) ** 2, _degrees(bf16), scatter.degrees))
        yield Choice(kept, misfit, p_of_fit)


def _misfit(bf16: pd.DataFrame) -> float | None:
    if _degrees(bf16) < 1:
        return None
    return scaling.misfit(scaling.fit_joint(bf16, delta=scaling.LEAST_SQUARES), bf16)


def _degrees(bf16: pd.DataFrame) -> int:
    """Losses beyond the constants of a law."""
    return len(bf16) - CONSTANTS
