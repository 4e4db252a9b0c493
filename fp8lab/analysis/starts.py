"""The first minutes of models too large to train to an end here: whether FP8 starts as BF16 does.

So early a loss falls fast, and a difference in it says little by itself. `Start` puts it beside what it is worth: the
tokens that each takes to one training loss, at the highest learning rate, since two runs whose rates decay at one step
cannot be compared at two. The two read different batches by then, so that the tokens are known
to some percent.

``runs/plans/early-h200.yaml`` trains them, and ``runs/plans/early-gradients-h200.yaml`` the same with one thing of
``fused``'s gradients changed: `Change` is what that does on one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.diagnosis import flushed_gradients
from fp8lab.analysis.runs import EARLY_GRADIENTS_PLAN, EARLY_PLAN, Run, RunSet, by_seed, plan_runs
from fp8lab.config import RECIPES, ScheduleConfig
from fp8lab.errors import UserError
from fp8lab.records import Speed
from fp8lab.schedule import decay_start, warmup_steps
from fp8lab.units import listing, signed, small_percent

WINDOWS = 12
"""At most so many are made of a run's steps at the highest rate: single batches differ by more than recipes do."""
FEWEST_SEEDS = 3
"""From so many on, an interval says more than the seeds one by one."""


@dataclass(frozen=True)
class Start:
    """The first minutes of one size in an FP8 recipe and in BF16: two runs of one seed, on the same batches."""

    ours: Run
    baseline: Run

    @property
    def size(self) -> str:
        return self.ours.size

    @property
    def recipe(self) -> str:
        return self.ours.recipe

    @property
    def gap(self) -> float:
        """Validation loss in the end, FP8 minus BF16 (nats/token)."""
        return self.ours.validation_loss - self.baseline.validation_loss

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
    """Every FP8 run that has BF16's of its size, seed and design beside it, small sizes first.

    Raises:
        UserError: two runs of BF16 could stand beside one of FP8.
    """
    pairs = [(run, _baselines(run, runs)) for run in runs.runs if run.recipe != "bf16"]
    for run, baselines in pairs:
        if len(baselines) > 1:
            raise UserError(f"{run.folder}: {listing([one.record.run for one in baselines])} could stand beside it")
    return [Start(run, baselines[0]) for run, baselines in pairs if baselines]


def _baselines(ours: Run, runs: RunSet) -> list[Run]:
    alike = (run for run in runs.where(size=ours.size, recipe="bf16") if run.record.seed == ours.record.seed)
    return [run for run in alike if not ours.design_differences(run)]


def early_runs(records_dir: Path) -> RunSet:
    """The runs of the first minutes that were made on a GPU, those with other gradients too; maybe none."""
    by_plan = [plan_runs(records_dir, plan) for plan in (EARLY_PLAN, EARLY_GRADIENTS_PLAN)]
    measured = [runs for runs in by_plan if not (runs and runs.toy)]
    found = [run for runs in measured for run in runs.runs]
    return RunSet(
        EARLY_PLAN,
        # A recipe by its defaults before what was changed of it.
        tuple(sorted(found, key=lambda run: (run.parameters, RECIPES.index(run.recipe), run.named, run.record.seed))),
        tuple(run for runs in measured for run in runs.unfinished),
    )


def by_setting(compared: Sequence[Start]) -> list[list[Start]]:
    """Starts that differ in their seed alone, together."""
    settings: dict[object, list[Start]] = {}
    for start in compared:
        settings.setdefault(start.ours.kind, []).append(start)
    return list(settings.values())


def gaps_text(seeds: Sequence[Start], unit: str = "nats") -> str:
    """The gaps of one setting, as prose has them: '+0.264 and +0.169 nats (seeds 1 and 2) with `fused` at 1.5B'.

    From `FEWEST_SEEDS` on their mean and its interval.
    """
    first = seeds[0]
    if len(seeds) >= FEWEST_SEEDS:
        ours, baseline = _losses(start.ours for start in seeds), _losses(start.baseline for start in seeds)
        return f"{Gap.by_seed(ours, baseline).text(unit)} with {first.ours.named} at {first.size}"
    told = listing([signed(start.gap, 3) for start in seeds])
    which = listing([str(start.ours.record.seed) for start in seeds])
    return f"{told} {unit} (seed{'s' if len(seeds) > 1 else ''} {which}) with {first.ours.named} at {first.size}"


def baseline_spread(compared: Sequence[Start], size: str) -> float | None:
    """How far the highest of BF16's losses at a size lies above the lowest (nats/token); None of a single seed."""
    losses = {start.baseline.record.seed: start.baseline.validation_loss for start in compared if start.size == size}
    return max(losses.values()) - min(losses.values()) if len(losses) > 1 else None


@dataclass(frozen=True)
class Change:
    """What a change of a recipe's defaults does to a start: two runs of one seed."""

    changed: Start
    default: Start

    @property
    def gap(self) -> float:
        """Validation loss in the end, changed minus default (nats/token)."""
        return self.changed.gap - self.default.gap

    @property
    def flushed(self) -> pd.DataFrame:
        """`diagnosis.flushed_gradients` of both at the tokens at which both measured: columns `changed`, `default`."""
        shares = {"changed": flushed_gradients(self.changed.ours), "default": flushed_gradients(self.default.ours)}
        return pd.DataFrame(shares).dropna()


def pairs_with_defaults(compared: Sequence[Start]) -> list[list[Change]]:
    """Starts with other than their recipe's defaults, each beside that of its seed with them, by setting."""

    def default_of(changed: Start) -> Start | None:
        kind = (changed.baseline, changed.recipe, changed.ours.record.head)
        alike = (one for one in compared if (one.baseline, one.recipe, one.ours.record.head) == kind)
        return next((one for one in alike if not one.ours.changed_settings), None)

    pairs = [
        [Change(start, default) for start in setting if start.ours.changed_settings and (default := default_of(start))]
        for setting in by_setting(compared)
    ]
    return [setting for setting in pairs if setting]


def change_between(pairs: Sequence[Change]) -> Gap:
    """Of one setting: the mean loss with the change minus that by the defaults, on the same seeds."""
    changed, default = (_losses(pair.changed.ours for pair in pairs), _losses(pair.default.ours for pair in pairs))
    return Gap.by_seed(changed, default)


def changes_text(pairs: Sequence[Change]) -> str:
    """A clause on one setting: '`fused` (`history: 4`) ended 0.1 nats below `fused` by its defaults (seed 2)'.

    From `FEWEST_SEEDS` on with the mean and its interval.
    """
    ours = pairs[0].changed.ours
    defaults = f"`{ours.recipe}` by its defaults"
    if len(pairs) >= FEWEST_SEEDS:
        return f"{ours.named} ended {change_between(pairs)} from {defaults}"
    told = [
        f"{abs(pair.gap):.3f} nats {'below' if pair.gap < 0 else 'above'} (seed {pair.changed.ours.record.seed})"
        for pair in pairs
    ]
    return f"{ours.named} ended {listing(told)} {defaults}"


def flushed_text(pairs: Sequence[Change]) -> str:
    """A clause on the most gradients that each side flushed where both measured, over all seeds; else empty."""
    shares = pd.concat([pair.flushed for pair in pairs])
    if shares.empty:
        return ""
    changed, default = (small_percent(most) for most in shares[["changed", "default"]].max())
    return (
        f"in the mean of all Linears, rounding flushed at most {changed} of its gradients to zero, against {default} "
        "by its defaults"
    )


def _losses(runs: Iterable[Run]) -> dict[int, float]:
    """Validation loss in the end (nats/token) by seed."""
    return by_seed(runs, lambda run: run.validation_loss)


def left_out(runs: RunSet) -> str:
    """A sentence about the starts that diverged or have no BF16 beside them, and so are in no gap; maybe empty."""
    lost = [f"`{run.record.run}`" for run in runs.unfinished if run.record.status == "diverged"]
    alone = [f"`{run.record.run}`" for run in runs.runs if run.recipe != "bf16" and not _baselines(run, runs)]
    said = [f"Diverged and in no gap: {listing(lost)}."] if lost else []
    said += [f"Without a run of BF16 of its seed and design, and in no gap: {listing(alone)}."] if alone else []
    return " ".join(said)


def figure_label(size: str) -> str:
    """Of the figure of a size's first minutes: 'start-1-5b'."""
    return f"start-{size.lower().replace('.', '-')}"


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
