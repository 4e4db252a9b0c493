"""Which final losses a scaling law is fitted to.

A power law describes a loss after its first fall. A schedule of a few hundred steps ends inside that fall, which is so
steep that one such run can set the exponent of tokens by itself. So the shortest schedules are left out, one length
after the other, until seeds alone would scatter the rest about the law as far as they lie from it; `lengths` tells how
much hangs on that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pandas as pd
from scipy import stats

from fp8lab.analysis import scaling
from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.scaling import JointLaw

FEWEST_SIZES = 3
"""Of a precision that takes part in a law."""
SIGNIFICANCE = 0.05
"""Seeds do not explain how far runs lie from a law if they alone would put them so far less often than this."""


def several_sizes(points: pd.DataFrame) -> pd.DataFrame:
    """Rows of `losses.final_losses` in the precisions that ran their full length at `FEWEST_SIZES` or more."""
    sizes = points[~points["is_branch"]].groupby("recipe")["size"].nunique()
    return points[points["recipe"].map(sizes) >= FEWEST_SIZES]


def long_enough(points: pd.DataFrame, scatter: Deviation | None) -> pd.DataFrame:
    """`points` without the shortest schedules, as few of them as leave a law that fits; all where none does.

    Args:
        points: as `losses.final_losses` gives them, BF16 among them.
        scatter: of final losses between seeds (nats a token); without it nothing tells a misfit, and all are kept.
    """
    if scatter is None:
        return points
    for kept in _without_the_shortest(points):
        if lack_of_fit(kept, scaling.fit_joint(kept), scatter) >= SIGNIFICANCE:
            return kept
    return points


def lack_of_fit(points: pd.DataFrame, law: JointLaw, scatter: Deviation) -> float:
    """How likely seeds alone put the losses at least as far from the law that was fitted to them.

    The F test of the residuals' variance against that between seeds. Runs of one seed in several precisions move
    together, so there are fewer independent ones than it counts.
    """
    free = len(points) - len(fields(scaling.Chinchilla)) - len(law.multipliers)
    if free < 1:
        return 1.0
    squares = float(((law.of(points) - points["loss"]) ** 2).sum())
    return float(stats.f.sf(squares / free / scatter.value**2, free, scatter.degrees))


@dataclass(frozen=True)
class Choice:
    """The joint law of the schedules from some length on."""

    steps: int
    """Of the shortest that takes part."""
    runs: int
    """Final losses that take part."""
    law: JointLaw
    misfit: float
    """Root of the mean squared residual, nats a token."""
    p: float | None
    """`lack_of_fit`; None where no seeds were repeated."""


def lengths(points: pd.DataFrame, scatter: Deviation | None) -> list[Choice]:
    """Every choice of the shortest schedule that takes part, as long as what is left identifies a law."""
    choices = []
    for kept in _without_the_shortest(points):
        law = scaling.fit_joint(kept)
        misfit = math.sqrt(((law.of(kept) - kept["loss"]) ** 2).mean())
        p = lack_of_fit(kept, law, scatter) if scatter else None
        choices.append(Choice(int(kept["steps"].min()), len(kept), law, misfit, p))
    return choices


def _without_the_shortest(points: pd.DataFrame) -> list[pd.DataFrame]:
    """`points`, then without those of the fewest steps, and so on while BF16's still identify a law."""
    choices = [points[points["steps"] >= steps] for steps in sorted(points["steps"].unique())]
    identified = []
    for kept in choices:
        bf16 = kept[kept["recipe"] == "bf16"]
        if scaling.unidentified(bf16["parameters"], bf16["tokens"]):
            break
        identified.append(kept)
    return identified
