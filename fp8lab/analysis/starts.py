"""The first minutes of models too large to train to an end here: whether FP8 starts as BF16 does.

So early a loss falls fast, and a difference in it says little by itself. `Start` puts it beside what it is worth: the
tokens that FP8 takes to the training loss that BF16 had with fewer, at the highest learning rate, since two runs whose
rates decay at one step cannot be compared at two. The two read different batches by then, so that the tokens are known
to some percent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.runs import EARLY_PLAN, Run, RunSet, plan_runs
from fp8lab.config import ScheduleConfig
from fp8lab.records import Speed
from fp8lab.schedule import decay_start, warmup_steps
from fp8lab.units import listing

WINDOWS = 12
"""At most so many are made of a run's steps at the highest rate: single batches differ by more than recipes do."""


@dataclass(frozen=True)
class Start:
    """The first minutes of one size in an FP8 recipe and in BF16: one run of each, of one seed where they share one."""

    gap: Gap
    """Of the losses in the end, FP8 minus BF16, over all seeds (nats/token)."""
    ours: Run
    baseline: Run

    @property
    def size(self) -> str:
        return self.ours.size

    @property
    def recipe(self) -> str:
        return self.ours.recipe

    def text(self, unit: str = "nats") -> str:
        """The gap as prose has it."""
        return self.gap.text_of(self.recipe, self.size, unit)

    @cached_property
    def tokens_to_one_loss(self) -> tuple[float, float] | None:
        """Tokens of FP8 and of BF16 to the lowest training loss that both have before their decay.

        None where a run has no two windows of steps at its highest rate, or had that loss before the first.
        """
        ours, baseline = _stable_loss(self.ours), _stable_loss(self.baseline)
        if min(len(ours), len(baseline)) < 2:
            return None
        loss = max(ours.min(), baseline.min())
        if loss > min(ours.iloc[0], baseline.iloc[0]):
            return None
        return _tokens_to(loss, ours), _tokens_to(loss, baseline)

    @property
    def token_factor(self) -> float | None:
        """`tokens_to_one_loss`, FP8's over BF16's."""
        tokens = self.tokens_to_one_loss
        return tokens[0] / tokens[1] if tokens else None

    @property
    def time_factor(self) -> float | None:
        """The same in time, at the tokens/s of the two runs."""
        return self.token_factor / self.speed_ratio if self.token_factor and self.speed_ratio else None

    @property
    def speed_ratio(self) -> float | None:
        """Of median tokens/s, FP8's over BF16's, each alone on a GPU of one kind; None where that is not so."""
        return self._ratio(lambda speed: speed.tokens_per_second_median)

    @property
    def memory_ratio(self) -> float | None:
        """Of peak memory, FP8's over BF16's."""
        return self._ratio(lambda speed: speed.peak_memory_bytes)

    def _ratio(self, quantity: Callable[[Speed], float | None]) -> float | None:
        ours, baseline = self.ours.record, self.baseline.record
        places = {(one.provenance.device_name, one.provenance.device_count) for one in (ours, baseline)}
        shared = max(one.provenance.concurrent_runs for one in (ours, baseline)) > 1
        if len(places) > 1 or shared or ours.emulated or not ours.speed or not baseline.speed:
            return None
        top, bottom = quantity(ours.speed), quantity(baseline.speed)
        return top / bottom if top and bottom else None


def starts(runs: RunSet) -> list[Start]:
    """Of every size and FP8 recipe that has BF16 beside it, small sizes first."""
    found = []
    for (size, recipe), gap in runs.gaps().items():
        pairs = itertools.product(runs.where(size=size, recipe=recipe), runs.where(size=size, recipe="bf16"))
        # Runs of one seed see the same batches in the same order.
        ours, baseline = min(pairs, key=lambda pair: (pair[0].record.seed != pair[1].record.seed, pair[0].record.seed))
        found.append(Start(gap, ours, baseline))
    return found


def early_runs(records_dir: Path) -> RunSet:
    """The runs of the first minutes that were made on a GPU; an empty set where none were."""
    runs = plan_runs(records_dir, EARLY_PLAN)
    return RunSet(EARLY_PLAN, ()) if runs and runs.toy else runs


def diverged(runs: RunSet) -> str:
    """A sentence about the starts that diverged, and so are in no gap; empty where none did."""
    lost = [f"`{run.record.run}`" for run in runs.unfinished if run.record.status == "diverged"]
    return f"Diverged and in no gap: {listing(lost)}." if lost else ""


def _stable_loss(run: Run) -> pd.Series:
    """Mean training loss (nats/token) over windows of steps at the highest rate, by their mean tokens."""
    schedule, steps = ScheduleConfig(**run.record.config["schedule"]), run.record.steps
    first = warmup_steps(schedule, steps)
    # A cosine leaves the highest rate as soon as it is reached.
    last = decay_start(schedule, steps) if schedule.kind == "wsd" else first
    table = run.metrics[run.metrics["step"].between(first + 1, last)]
    width = max(1, math.ceil(len(table) / WINDOWS))
    # From the end, so that the last window is whole.
    groups = (len(table) - 1 - np.arange(len(table))) // width
    windowed = table.groupby(groups)[["tokens", "loss"]].mean().sort_values("tokens")
    return windowed.set_index("tokens")["loss"]


def _tokens_to(loss: float, curve: pd.Series) -> float:
    """Tokens at which `curve` first reaches `loss`, between its windows by the logarithm of tokens."""
    lowest = curve.cummin().drop_duplicates()
    return math.exp(float(np.interp(-loss, -lowest, np.log(lowest.index.to_numpy(dtype=float)))))
