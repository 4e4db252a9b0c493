"""Should I switch on FP8? What the records say of it, by width, memory, tokens a micro-batch and loss.

A recipe *is faster* at a setting where it beat BF16 in every round timed there, and *slower* where it lost in
every round. It *pays from a width on* where it is faster at every setting of that width and of all wider ones
that were timed; it pays *never* where it is faster at none. Rounds of one process are no confidence interval:
they say what this machine did, on these occasions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fp8lab import matched
from fp8lab.config import MODELS, RECIPES, parameter_count
from fp8lab.losses import MeasuredGap, measured_gaps, measured_sets
from fp8lab.matched import Estimate
from fp8lab.results import SpeedRun
from fp8lab.scaling import BESIROGLU
from fp8lab.timings import with_verdicts

TOKENS_PER_PARAMETER = 20
"""For what a loss costs at sizes that were timed and not trained."""


@dataclass(frozen=True)
class Payoff:
    """At which widths a recipe is faster than BF16, over all devices and settings timed."""

    recipe: str
    head: str
    widths: tuple[int, ...]
    """Those that were timed, ascending."""
    pays_from: int | None
    """Narrowest width from which on it is faster at every setting; None where it is not at the widest."""
    faster: int
    """Settings at which it is."""
    settings: int
    slowest: float
    """Smallest and largest ratio to BF16 at the settings from `pays_from` on; at all of them where that is None."""
    fastest: float

    @property
    def never(self) -> bool:
        return self.faster == 0


def payoffs(table: pd.DataFrame) -> list[Payoff]:
    """Of every FP8 recipe and head in `timings.with_verdicts`, the widest gain first."""
    found = []
    for (recipe, head), rows in table[table["recipe"].isin(RECIPES[1:])].groupby(["recipe", "head"], sort=False):
        widths = sorted(set(rows["width"]))
        faster = rows["verdict"] == "faster"
        paying = [width for width in widths if faster[rows["width"] >= width].all()]
        pays_from = min(paying) if paying else None
        counted = rows if pays_from is None else rows[rows["width"] >= pays_from]
        found.append(
            Payoff(
                recipe=str(recipe),
                head=str(head),
                widths=tuple(widths),
                pays_from=pays_from,
                faster=int(faster.sum()),
                settings=len(rows),
                slowest=float(counted["ratio"].min()),
                fastest=float(counted["ratio"].max()),
            )
        )
    return sorted(found, key=lambda payoff: (payoff.pays_from or float("inf"), -payoff.fastest))


@dataclass(frozen=True)
class Matched:
    """Speed and loss of one recipe at one size, put together."""

    measured: MeasuredGap
    tokens: Estimate
    """Tokens for BF16's loss over BF16's tokens."""
    ratio: Estimate | None
    """Tokens a second over BF16's; None where this size was not timed."""
    device: str | None
    speedup: Estimate | None


def loss_matched(records_dir: Path, speeds: Sequence[SpeedRun]) -> list[Matched]:
    """The loss-matched speed-up of every recipe and size that was trained on a GPU, and timed where `ratio` is given.

    Speed is the speed map's, of the size with the run's own head and, where there are several settings, on the run's
    device and with most tokens a micro-batch.
    """
    table = with_verdicts(speeds) if speeds else pd.DataFrame()
    found = []
    for measured in measured_gaps(measured_sets(records_dir)):
        tokens = matched.token_factors(measured.gap, measured.slope.nats)
        timed = _timing(table, measured)
        if timed is None:
            found.append(Matched(measured, tokens, None, None, None))
            continue
        ratio = Estimate(float(timed["ratio"]), (float(timed["low"]), float(timed["high"])))
        speedup = matched.loss_matched(ratio, measured.gap, measured.slope.nats)
        found.append(Matched(measured, tokens, ratio, str(timed["device"]), speedup))
    return found


def _timing(table: pd.DataFrame, measured: MeasuredGap) -> pd.Series | None:
    if table.empty:
        return None
    run = measured.runs.where(size=measured.size, recipe=measured.recipe)[0]
    rows = table[
        (table["model"] == measured.size)
        & (table["recipe"] == measured.recipe)
        & (table["head"] == run.record.head)
        & (table["width"] == run.record.model.d_model)
    ]
    if rows.empty:
        return None
    here = rows[rows["device"] == run.record.provenance.device_name]
    return (rows if here.empty else here).sort_values("micro_batch_tokens").iloc[-1]


def affordable_gap(model: str, ratio: float) -> float:
    """Loss (nats) that a ratio of speeds would pay for at a named size: published law, 20 tokens a parameter."""
    tokens = TOKENS_PER_PARAMETER * parameter_count(MODELS[model])
    return matched.affordable_gap(ratio, matched.law_slope(BESIROGLU, tokens))
