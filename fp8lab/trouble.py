"""Signs that a training went wrong: where a run had them, and how FP8's runs compare with BF16's.

A run and the branches that decayed from it share most of their training, so they are one *family*, in trouble where
one of them was. A spike is judged from the hundred losses before it, so a run whose losses were hardly logged is hardly
judged: a family says something of stability only where at least half of its steps were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fp8lab.comparison import LEVEL
from fp8lab.results import Run, RunSet
from fp8lab.spikes import spikes

LAST_PART = 0.1
"""Share of a run that is its end."""
JUDGED = 0.5
"""Share of a run's steps whose loss must have been judged."""


@dataclass(frozen=True)
class Family:
    """A run and the decay branches that left it."""

    run: Run
    branches: tuple[Run, ...] = ()

    @property
    def diverged(self) -> bool:
        return any(member.record.status == "diverged" for member in self.members)

    @property
    def members(self) -> tuple[Run, ...]:
        return (self.run, *self.branches)

    @property
    def is_judged(self) -> bool:
        """Whether enough of its steps were looked at, so that no trouble says something.

        Of all members together: a branch may be shorter than the history that a spike is judged from.
        """
        counts = [_judged(member) for member in self.members]
        return sum(judged for judged, _ in counts) >= JUDGED * sum(steps for _, steps in counts)

    @property
    def early_trouble(self) -> bool:
        """In the run or a branch, before its last tenth."""
        return any((share := first_trouble(member)) is not None and share < 1 - LAST_PART for member in self.members)

    @property
    def late_trouble(self) -> bool:
        """In a last tenth and not before."""
        return not self.early_trouble and any(first_trouble(member) is not None for member in self.members)


def families(plans: Sequence[RunSet], size: str, recipe: str) -> list[Family]:
    """Of all runs that finished or diverged."""
    return [
        Family(run, tuple(one for one in plan.branches if _is_branch(one, run)))
        for plan in plans
        for run in (*plan.where(size=size, recipe=recipe), *_diverged(plan, size, recipe))
    ]


def _is_branch(branch: Run, run: Run) -> bool:
    return branch.record.parent is not None and branch.record.parent.run == run.record.run


def _diverged(plan: RunSet, size: str, recipe: str) -> list[Run]:
    return [
        run for run in plan.unfinished if run.record.status == "diverged" and (run.size, run.recipe) == (size, recipe)
    ]


def _judged(run: Run) -> tuple[int, int]:
    """Steps whose loss was judged, none where the record does not say; and all of the run's own."""
    record = run.record
    own = record.steps - (record.parent.step if record.parent else 0)
    return (record.stability.judged_steps or 0) if record.stability else 0, own


def first_trouble(run: Run) -> float | None:
    """Share of the run done when it first skipped a step, spiked or diverged; None where it never did.

    0 where the record says that it did and no logged step shows when.
    """
    record = run.record
    metrics = run.metrics
    bad = metrics["skipped"].astype(bool) | ~np.isfinite(metrics["loss"]) | (spikes(metrics["loss"]) == 1)
    stability = record.stability
    steps = (stability.first_bad_step, stability.first_spike_step) if stability else ()
    tokens = [step * record.global_batch_tokens for step in steps if step is not None]
    tokens += metrics["tokens"][bad].head(1).tolist()
    if tokens:
        return float(min(tokens)) / int(record.config["tokens"])
    troubled = record.status == "diverged" or (stability and (stability.skipped_steps or stability.spike_score))
    return 0.0 if troubled else None


def excess_p(troubled: int, of: int, baseline_troubled: int, baseline_of: int) -> float:
    """One-sided p of Fisher's exact test that FP8's families are in trouble no more often than BF16's."""
    table = [[troubled, of - troubled], [baseline_troubled, baseline_of - baseline_troubled]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def most_frequent(untroubled: int) -> float:
    """How often trouble may come at most where so many families had none: 95%, one-sided."""
    return 1.0 if untroubled == 0 else float(1 - (1 - LEVEL) ** (1 / untroubled))
