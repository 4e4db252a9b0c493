"""The variance study: which design tells soonest what FP8 costs.

``runs/plans/variance-h200.yaml`` trains the smallest size with several seeds in BF16 and in FP8 under a few
designs (learning rate, decay, batch), each with a moving average of its weights beside the weights. Runs that
scatter less need fewer seeds for the same interval; a design may pay for it in GPU time or in loss. Here the
records become a `Cell` a design and kind of weights, and each cell the pairs and GPU minutes that it asks for.

The study also decides, once for each design, whether seeds pair: where the runs of a design show that a seed moves
both recipes alike, other plans' runs of that design are compared in pairs (`with_pairs`). The study's own gaps are
Welch's, since the runs that a choice was made by cannot also be its test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fp8lab.analysis.comparison import TARGET_HALF_WIDTH, Design, Deviation, Gap
from fp8lab.analysis.runs import Run, RunSet, by_seed, plan_runs, seed_deviation
from fp8lab.plan import Plan
from fp8lab.units import listing, unique

VARIANCE_PLAN = "variance-h200"
VARIANCE_COMMAND = "fp8lab run runs/plans/variance-h200.yaml"
BASE = "base"
"""The design that the others change one thing of."""


@dataclass(frozen=True)
class Cell:
    """All seeds of one design, by the weights at the end or by their moving average."""

    design: str
    """What its runs' names end in: 'low-rate'."""
    averaged: bool
    runs: tuple[Run, ...]

    @property
    def size(self) -> str:
        return self.runs[0].size

    @property
    def fp8_recipe(self) -> str:
        return next(run.recipe for run in self.runs if run.recipe != "bf16")

    @property
    def seeds(self) -> int:
        """Of the recipe that has fewer."""
        return min(len(self.losses(recipe)) for recipe in ("bf16", self.fp8_recipe))

    @property
    def weights(self) -> str:
        """Which weights were validated."""
        return "averaged" if self.averaged else "last"

    def losses(self, recipe: str) -> dict[int, float]:
        """Validation loss (nats/token) by seed."""
        return by_seed((run for run in self.runs if run.recipe == recipe), self._loss)

    def _loss(self, run: Run) -> float:
        averaged = run.averaged
        return averaged.validation_loss if self.averaged and averaged is not None else run.validation_loss

    @cached_property
    def gap(self) -> Gap:
        """FP8 minus BF16, by Welch's interval."""
        return Gap.by_seed(self.losses(self.fp8_recipe), self.losses("bf16"))

    @cached_property
    def scatter(self) -> Deviation:
        """Of runs around the mean of their recipe."""
        deviation = Deviation.pooled([list(self.losses(recipe).values()) for recipe in ("bf16", self.fp8_recipe)])
        assert deviation is not None
        return deviation

    @cached_property
    def differences(self) -> Deviation | None:
        """Scatter of the differences between runs of the same seed."""
        ours, baseline = self.losses(self.fp8_recipe), self.losses("bf16")
        return Deviation.pooled([[ours[seed] - baseline[seed] for seed in ours if seed in baseline]])

    @property
    def pairs_help(self) -> bool:
        """Whether these runs show that a seed moves both recipes alike."""
        return self.gap.correlation is not None and self.gap.correlation.is_measurable

    @cached_property
    def comparison(self) -> Design:
        """How later runs of this design are best compared: in pairs where those help, else as two groups."""
        if self.pairs_help and self.differences is not None:
            return Design(self.differences, paired=True)
        return Design(self.scatter, paired=False)

    @property
    def pair_minutes(self) -> float:
        """GPU minutes of one run in each recipe: medians of the wall time, shared by those that ran at once."""
        return (
            sum(
                float(np.median([_gpu_seconds(run) for run in self.runs if run.recipe == recipe and run.record.speed]))
                for recipe in ("bf16", self.fp8_recipe)
            )
            / 60
        )

    def minutes_needed(self, half_width: float = TARGET_HALF_WIDTH) -> tuple[float, float, float]:
        """GPU minutes for an interval of plus or minus `half_width`: as measured, and at the ends of what is known."""
        low, high = self.comparison.pairs_range(half_width)
        needed = self.comparison.pairs_needed(half_width)
        return needed * self.pair_minutes, low * self.pair_minutes, high * self.pair_minutes


def _gpu_seconds(run: Run) -> float:
    assert run.record.speed is not None
    return run.record.speed.wall_seconds / run.record.provenance.concurrent_runs


@dataclass(frozen=True)
class Study:
    """Every cell that can be compared, by design and then by weights."""

    runs: RunSet
    cells: tuple[Cell, ...]

    def __bool__(self) -> bool:
        return bool(self.cells)

    @property
    def base(self) -> Cell:
        """The last weights of the base design, or of the first one there is."""
        return next((cell for cell in self.cells if cell.design == BASE), self.cells[0])

    @property
    def cheapest(self) -> Cell:
        """The cell that reaches the target in the fewest GPU minutes, as measured."""
        return min(self.cells, key=lambda cell: cell.minutes_needed()[0])

    def pairs_help(self, run: Run) -> bool:
        """Whether the study has decided for pairs in the design and size of `run`; False where it trained none such."""
        return any(
            cell.pairs_help and not cell.averaged and cell.runs[0].design_settings == run.design_settings
            for cell in self.cells
        )

    def loss_cost(self, cell: Cell) -> Gap:
        """BF16 loss of `cell` minus that of `base`: what its quietness costs."""
        return Gap.by_seed(cell.losses("bf16"), self.base.losses("bf16"))


def with_pairs(runs: RunSet, study: Study) -> RunSet:
    """`runs` with its gaps taken over pairs of seeds at the sizes where the study has decided for that."""
    paired = {run.size for run in runs.runs if runs.plan != study.runs.plan and study.pairs_help(run)}
    return replace(runs, paired_sizes=frozenset(paired))


@dataclass(frozen=True)
class Line:
    """One curve of half-width against runs: a size or design, and how many runs of each recipe there are."""

    design: Design
    seeds: int
    """Zero where a size has none in BF16."""
    devices: tuple[str, ...]
    """That the scatter was measured on."""


def lines(sets: Sequence[RunSet], study: Study) -> dict[str, Line]:
    """By label: every size that has seeds, as the first of `sets` tuned it, then the study's designs by last weights.

    The cheapest cell is among them, also where that is an average.
    """
    found = {}
    trained = [runs for runs in sets if runs.plan != study.runs.plan]
    for size in unique(size for runs in trained for size in runs.sizes):
        first = next(runs.where(size=size)[0] for runs in trained if runs.where(size=size))
        alike = [replace(runs, runs=_tuned_as(first, runs.runs)) for runs in trained]
        deviation = seed_deviation(alike, first, size=size)
        if deviation is not None:
            seeds = max(len(runs.where(size=size, recipe="bf16")) for runs in alike)
            found[size] = Line(Design(deviation, paired=False), seeds, _devices_of(_repeated(alike, size)))
    for cell in study.cells:
        if not cell.averaged or cell is study.cheapest:
            name = f"{cell.size}, {cell.design}{', averaged' if cell.averaged else ''}"
            found[name] = Line(cell.comparison, cell.seeds, _devices_of(cell.runs))
    return found


def _tuned_as(like: Run, runs: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(run for run in runs if run.tuning == like.tuning)


def _repeated(sets: Sequence[RunSet], size: str) -> list[Run]:
    """The runs of a size that another one differs from in seed alone: those that its scatter is known from."""
    groups = [runs.where(size=size, recipe=recipe) for runs in sets for recipe in runs.recipes]
    return [run for group in groups if len(group) > 1 for run in group]


def _devices_of(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(unique(run.record.provenance.device_name for run in runs))


def progress(runs: RunSet, plan: Plan, design: str = BASE) -> str:
    """How many runs of a design are recorded, of those planned: '5 of 8 `bf16` and 0 of 8 `fused` runs'."""
    planned = Counter(config.recipe for config in plan.runs if config.run.endswith(f"-{design}"))
    recorded = Counter(run.recipe for run in runs.runs if design_of(run) == design)
    return listing([f"{recorded[recipe]} of {count} `{recipe}`" for recipe, count in planned.items()]) + " runs"


def study(records_dir: Path, plan: str = VARIANCE_PLAN) -> Study:
    """The study's cells of which both recipes have at least two seeds; empty where nothing was measured."""
    runs = plan_runs(records_dir, plan)
    designs = unique([BASE, *(design_of(run) for run in runs.runs)])
    cells = (_cell(runs.runs, design, averaged) for design in designs for averaged in (False, True))
    return Study(runs, tuple(cell for cell in cells if cell is not None))


def design_of(run: Run) -> str:
    """Its name in the study: the base is what no entry named."""
    return run.design or BASE


def _cell(runs: Sequence[Run], design: str, averaged: bool) -> Cell | None:
    """None where there are not two seeds each of BF16 and one FP8 recipe."""
    chosen = tuple(run for run in runs if design_of(run) == design and (not averaged or run.averaged is not None))
    seeds = Counter(run.recipe for run in chosen)
    return Cell(design, averaged, chosen) if "bf16" in seeds and len(seeds) == 2 and min(seeds.values()) > 1 else None
