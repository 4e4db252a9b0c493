"""What of ``fused`` costs loss: variants that change one thing of it, in the quietest design of the variance study.

``runs/plans/numerics-h200.yaml`` trains them on the study's seeds, so that the study's runs of the same design are the
other side of every difference: BF16, and ``fused`` as it is by default. torchao's ``tensorwise`` is among the variants,
since a loss that any FP8 recipe has is not for ``fused`` to win back. Every variant is a comparison more, and the best
of several differs from the rest by chance more easily than one alone: it is a candidate.
``runs/plans/candidates-h200.yaml`` trains candidates on seeds that did not choose them, beside those of ``seeds-h200``,
``runs/plans/gradients-h200.yaml`` one of them at the ladder's largest size. What they do to the first minutes of larger
models is `fp8lab.analysis.starts`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.runs import LADDER_PLAN, SEEDS_PLAN, Run, RunSet, by_seed, plan_runs
from fp8lab.analysis.variance import VARIANCE_PLAN, Study, design_of
from fp8lab.units import unique

NUMERICS_PLAN = "numerics-h200"
REFERENCES = {
    NUMERICS_PLAN: VARIANCE_PLAN,
    "candidates-h200": SEEDS_PLAN,
    "gradients-h200": LADDER_PLAN,
}
"""Plans of variants, and those whose runs of the same design and seeds are the other side of their differences."""
SEEDS = {
    NUMERICS_PLAN: "On the seeds that the variants are chosen by",
}
"""What a plan's seeds know of its variants; of other plans nothing."""


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone."""

    runs: tuple[Run, ...]

    @property
    def recipe(self) -> str:
        return self.runs[0].recipe

    @property
    def head(self) -> str:
        return self.runs[0].record.head

    @property
    def size(self) -> str:
        return self.runs[0].size

    @property
    def changed_settings(self) -> str:
        """In what ``fused`` differs from its defaults ('gradient_format: e5m2'); empty where in nothing."""
        return self.runs[0].changed_settings

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss (nats/token) by seed."""
        return by_seed(self.runs, lambda run: run.validation_loss)

    def minus(self, other: Variant) -> Gap:
        """Difference in loss to `other`, by Welch's interval."""
        return Gap.by_seed(self.losses, other.losses)


def find(variants: Sequence[Variant], recipe: str, head: str = "bf16", changes: str = "") -> Variant | None:
    """The one of these, a recipe by its defaults if no changes are named; None where there is none."""
    return next(
        (one for one in variants if (one.recipe, one.head, one.changed_settings) == (recipe, head, changes)), None
    )


@dataclass(frozen=True)
class HeadCost:
    """What the output head in FP8 as well does to the loss of a recipe at one size."""

    plan: str
    size: str
    recipe: str
    own: Gap
    """Against the same recipe with its head in BF16."""
    against_bf16: Gap


def head_costs(plan: str, tried: Sequence[Variant]) -> list[HeadCost]:
    """Of every recipe that was trained by its defaults with either head.

    Args:
        plan: whose `variants` these are.
    """
    found = []
    for one in tried:
        itself, bf16 = find(tried, one.recipe), find(tried, "bf16")
        if one.head == "fp8" and not one.changed_settings and itself is not None and bf16 is not None:
            found.append(HeadCost(plan, one.size, one.recipe, one.minus(itself), one.minus(bf16)))
    return found


def best_known_head_costs(records_dir: Path) -> list[HeadCost]:
    """Of each recipe by the plan with most seeds."""
    most: dict[str, HeadCost] = {}
    for cost in (cost for plan in REFERENCES for cost in head_costs(plan, variants(records_dir, plan))):
        if cost.recipe not in most or cost.own.seeds > most[cost.recipe].own.seeds:
            most[cost.recipe] = cost
    return list(most.values())


def variants(records_dir: Path, plan: str) -> list[Variant]:
    """BF16 and `fused` by default, then the runs of `plan` by what they change; empty where one side has no run."""
    tried = plan_runs(records_dir, plan).runs
    if not tried:
        return []
    kinds: dict[tuple[str, str, str], list[Run]] = {}
    for run in _of_design((*plan_runs(records_dir, REFERENCES[plan]).runs, *tried), tried[0]):
        kinds.setdefault((run.recipe, run.record.head, run.changed_settings), []).append(run)
    found = [Variant(tuple(runs)) for runs in kinds.values()]
    return found if found[0].recipe == "bf16" else []


def designs(records_dir: Path, study: Study) -> list[RunSet]:
    """Every recipe by its defaults in each design of the study, the one that it found cheapest first."""
    tried = plan_runs(records_dir, NUMERICS_PLAN)
    trained = [*study.runs.runs, *study.runs.unfinished]
    names = unique([*([study.cheapest.design] if study else []), *(design_of(run) for run in trained)])
    likes = [next(run for run in trained if design_of(run) == name) for name in names]
    return [
        RunSet(
            VARIANCE_PLAN,
            runs=_by_default(like, study.runs.runs, tried.runs),
            unfinished=_by_default(like, study.runs.unfinished, tried.unfinished),
        )
        for like in likes
    ]


def _by_default(like: Run, *groups: Sequence[Run]) -> tuple[Run, ...]:
    of_design = _of_design([run for group in groups for run in group], like)
    return tuple(run for run in of_design if run.record.head == "bf16" and not run.changed_settings)


def _of_design(runs: Sequence[Run], like: Run) -> list[Run]:
    return [run for run in runs if run.design_settings == like.design_settings]
