"""Should I switch on FP8? What the records say of it, by width, memory, tokens a micro-batch and loss.

A recipe *is faster* at a setting where the 95% interval of its ratio to BF16 lies above 1, *slower* where it lies
below, and else undecided (`fp8lab.analysis.rounds`: fewer than three rounds have no interval). It *pays from a width
on* where it is faster at every setting of that width and of all wider ones that were timed, and not at a narrower
one; it pays *never* where it is faster at none. Devices are judged apart, and so are whole models and the blocks of
the speed map. What was not timed is not spoken of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from fp8lab.analysis import matched, slopes
from fp8lab.analysis.losses import MeasuredGap, measured_gaps
from fp8lab.analysis.matched import Estimate, Slope
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.analysis.slopes import FittedLaw
from fp8lab.analysis.timings import fp8_only
from fp8lab.config import MODELS, parameter_count

TOKENS_PER_PARAMETER = 20
"""For what a loss costs at sizes that were timed and not trained."""


@dataclass(frozen=True)
class Payoff:
    """At which widths a recipe is faster than BF16, over all settings timed on one device."""

    device: str
    recipe: str
    head: str
    widths: tuple[int, ...]
    """Those that were timed, ascending."""
    contexts: tuple[int, ...]
    """Tokens a sequence of those settings, ascending."""
    pays_from: int | None
    """Narrowest width from which on it is faster at every setting; None where it is not at the widest."""
    faster: int
    """Settings at which it is."""
    slower: tuple[int, ...]
    """Widths with a setting at which BF16 is faster."""
    undecided: tuple[int, ...]
    """Widths with a setting at which neither is known to be."""
    settings: int
    slowest: float
    """Smallest and largest ratio to BF16 at the settings from `pays_from` on; at all of them where that is None."""
    fastest: float
    occasions: int
    """With rounds enough to count, of the setting that has fewest."""

    @property
    def never(self) -> bool:
        return self.faster == 0

    @property
    def everywhere(self) -> bool:
        """Faster at every width timed."""
        return self.pays_from == self.widths[0]


def payoffs(table: pd.DataFrame) -> list[Payoff]:
    """Of every device, FP8 recipe and head in `timings.with_verdicts`' rows of one kind; the widest gain first."""
    found = [
        _payoff(str(device), str(recipe), str(head), rows)
        for (device, recipe, head), rows in fp8_only(table).groupby(["device", "recipe", "head"], sort=False)
    ]
    return sorted(found, key=lambda payoff: (payoff.pays_from or float("inf"), -payoff.fastest))


def _payoff(device: str, recipe: str, head: str, rows: pd.DataFrame) -> Payoff:
    widths = _widths(rows)
    faster = rows["verdict"] == "faster"
    paying = [width for width in widths if faster[rows["width"] >= width].all()]
    pays_from = min(paying) if paying else None
    counted = rows if pays_from is None else rows[rows["width"] >= pays_from]
    return Payoff(
        device=device,
        recipe=recipe,
        head=head,
        widths=widths,
        contexts=tuple(sorted(set(rows["seq_len"]))),
        pays_from=pays_from,
        faster=int(faster.sum()),
        slower=_widths(rows[rows["verdict"] == "slower"]),
        undecided=_widths(rows[rows["verdict"] == "undecided"]),
        settings=len(rows),
        slowest=float(counted["ratio"].min()),
        fastest=float(counted["ratio"].max()),
        occasions=int(rows["occasions"].min()),
    )


def _widths(rows: pd.DataFrame) -> tuple[int, ...]:
    return tuple(sorted(int(width) for width in set(rows["width"])))


@dataclass(frozen=True)
class Matched:
    """Speed and loss of one recipe at one size, put together."""

    measured: MeasuredGap
    slope: Slope | None
    """None where nothing says how fast the loss falls at this size and length."""
    ratio: Estimate | None
    """Tokens a second over BF16's; None where this size was not timed."""
    device: str | None
    """That it was timed on: the runs' own, or another where they were not timed on theirs."""

    @property
    def tokens(self) -> Estimate | None:
        """Tokens for BF16's loss over BF16's tokens."""
        return matched.token_factors(self.measured.gap, self.slope) if self.slope else None

    @property
    def speedup(self) -> Estimate | None:
        if self.ratio is None or self.slope is None:
            return None
        return matched.loss_matched(self.ratio, self.measured.gap, self.slope)

    @property
    def trained_on(self) -> str:
        return _run(self.measured).record.provenance.device_name


def loss_matched(sets: Sequence[RunSet], laws: Sequence[FittedLaw], timings: pd.DataFrame) -> list[Matched]:
    """The loss-matched speed-up of every recipe and size that was trained on a GPU, and timed where `ratio` is given.

    Speed is that of whole models of the size, with the run's own head and, where there are several settings, on the
    run's device if it was timed there, and with most tokens a micro-batch.

    Args:
        sets: `losses.measured_sets`.
        laws: `slopes.known_laws`.
        timings: `timings.with_verdicts`; empty where nothing was timed.
    """
    found = []
    for measured in measured_gaps(sets):
        slope = slopes.slope_at(sets, measured.runs.where(size=measured.size, recipe="bf16")[0], laws)
        timed = _timing(timings, measured)
        if timed is None:
            found.append(Matched(measured, slope, None, None))
        else:
            found.append(Matched(measured, slope, _ratio(timed), str(timed["device"])))
    return found


def _run(measured: MeasuredGap) -> Run:
    return measured.runs.where(size=measured.size, recipe=measured.recipe)[0]


def _ratio(timed: pd.Series) -> Estimate:
    low, high = float(timed["interval_low"]), float(timed["interval_high"])
    return Estimate(float(timed["ratio"]), None if low != low else (low, high))


def _timing(table: pd.DataFrame, measured: MeasuredGap) -> pd.Series | None:
    if table.empty:
        return None
    run = _run(measured)
    rows = table[
        (table["kind"] == "model")
        & (table["model"] == measured.size)
        & (table["recipe"] == measured.recipe)
        & (table["head"] == run.record.head)
        & (table["width"] == run.record.model.d_model)
    ]
    if rows.empty:
        return None
    here = rows[rows["device"] == run.record.provenance.device_name]
    return (rows if here.empty else here).sort_values("micro_batch_tokens").iloc[-1]


def affordable_gap(model: str, ratio: float, laws: Sequence[FittedLaw]) -> float | None:
    """Loss (nats) that a ratio of speeds would pay for at a named size, trained on 20 tokens a parameter.

    None where none of `laws` (`slopes.known_laws`) was fitted to runs that large and long.
    """
    slope = slope_untrained(model, laws)
    return matched.affordable_gap(ratio, slope.nats) if slope else None


def slope_untrained(model: str, laws: Sequence[FittedLaw]) -> Slope | None:
    """The slope at a named size by the first of `laws` that reaches it, as if trained on 20 tokens a parameter."""
    parameters = parameter_count(MODELS[model])
    return slopes.by_law(laws, parameters, TOKENS_PER_PARAMETER * parameters)
