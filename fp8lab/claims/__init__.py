"""The source article's claims, each held against the records by a rule written here, a module a claim.

A verdict is *confirmed*, *contradicted* or *untested*, and follows from records alone: other records, another
verdict. Toy runs on a CPU decide nothing. `untested` covers what was not measured and what was measured too
coarsely, or too seldom, to tell; the sentence beside it says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fp8lab.analysis.losses import MeasuredGap
from fp8lab.analysis.runs import RunSet
from fp8lab.claims.benchmarks import barely_above_guessing, other_models
from fp8lab.claims.curves import curves_follow
from fp8lab.claims.finding import Finding
from fp8lab.claims.line import on_a_line
from fp8lab.claims.speed import OURS, STOCK_RECIPES, forty_percent
from fp8lab.claims.stability import stable_almost_to_the_end

__all__ = [
    "CLAIMED_TRAININGS",
    "OURS",
    "STOCK_RECIPES",
    "Finding",
    "barely_above_guessing",
    "curves_follow",
    "forty_percent",
    "on_a_line",
    "other_models",
    "scoreboard",
    "stable_almost_to_the_end",
]

CLAIMED_TRAININGS = ("125M", "250M", "350M", "1.5B")
"""Sizes that the source article says it trained in both precisions."""


def scoreboard(
    *,
    gaps: Sequence[MeasuredGap],
    stability: Sequence[RunSet],
    timings: pd.DataFrame,
    ladder: RunSet,
    scored: RunSet,
) -> list[Finding]:
    """Every claim, in the source article's order; one about each recipe where the claim is about FP8's loss.

    Args:
        gaps: `losses.measured_gaps`.
        stability: every plan trained on GPUs, of which those with seeds also tell the noise about a line.
        timings: `timings.with_verdicts`; empty where nothing was timed.
        ladder: the runs with most sizes.
        scored: the runs with scores.
    """
    return [
        *curves_follow(gaps),
        *stable_almost_to_the_end(stability),
        forty_percent(timings),
        on_a_line(ladder, stability),
        barely_above_guessing(scored),
        other_models(),
    ]
