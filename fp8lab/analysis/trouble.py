"""Signs that a training went wrong: where a run had them, and how FP8's runs compare with BF16's.

A run and the branches that decayed from it share most of their training, so they are one *family*, in trouble where
one of them was. Plans may train the same seed of one configuration; those runs are one family too, since counting them
as several would make chance look like evidence.

A spike is judged from the hundred losses before it, so a run whose losses were hardly logged is hardly judged: a
family says something of stability only where at least half of its steps were.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from fp8lab.analysis.comparison import LEVEL
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.config import RECIPES, recorded_fused
from fp8lab.spikes import spikes

LAST_PART = 0.1
"""Share of a run that is its end."""
JUDGED = 0.5
"""Share of a run's steps whose loss must have been judged."""


@dataclass(frozen=True)
class Family:
    """The runs of one training, of each plan that has it, and the decay branches that left them."""

    runs: tuple[Run, ...]
    branches: tuple[Run, ...] = ()

    @property
    def diverged(self) -> bool:
        return any(map(_diverged, self.members))

    @property
    def members(self) -> tuple[Run, ...]:
        return (*self.runs, *self.branches)

    @property
    def counted(self) -> tuple[Run, ...]:
        """Its members without their doubles in other plans; of doubles one that diverged, if one did."""
        by_name = {branch.record.run: branch for branch in sorted(self.branches, key=_diverged)}
        return (max(self.runs, key=_diverged), *by_name.values())

    @property
    def tokens(self) -> int:
        """That its longest run saw."""
        return max(run.record.tokens for run in self.runs)

    @property
    def tokens_per_parameter(self) -> float:
        """Rounded: 19.9999 are 20, cut to whole batches."""
        return round(self.tokens / self.runs[0].parameters, 1)

    @property
    def is_judged(self) -> bool:
        """Whether enough of its steps were looked at, so that no trouble says something.

        Of all members together: a branch may be shorter than the history that a spike is judged from.
        """
        judged = sum(judged_steps(member) or 0 for member in self.members)
        return judged >= JUDGED * sum(own_steps(member) for member in self.members)

    @cached_property
    def early_trouble(self) -> bool:
        """In the run or a branch, before its last tenth."""
        return any((share := first_trouble(member)) is not None and share < 1 - LAST_PART for member in self.members)

    @cached_property
    def late_trouble(self) -> bool:
        """In a last tenth and not before."""
        return not self.early_trouble and any(first_trouble(member) is not None for member in self.members)


def families(plans: Sequence[RunSet]) -> dict[tuple[str, str], list[Family]]:
    """By size and recipe, small sizes first: of all runs that finished, or diverged themselves or in a branch."""
    trainings: dict[str, Family] = {}
    for plan in plans:
        for run in (*plan.runs, *plan.unfinished):
            branches = _branches(plan, run)
            if _ended_for_itself(run) or any(map(_diverged, branches)):
                training = training_key(run)
                known = trainings.get(training, Family(runs=()))
                trainings[training] = Family((*known.runs, run), (*known.branches, *branches))
    found: dict[tuple[str, str], list[Family]] = {}
    for family in sorted(trainings.values(), key=_in_order):
        found.setdefault((family.runs[0].size, family.runs[0].recipe), []).append(family)
    return found


def _branches(plan: RunSet, run: Run) -> tuple[Run, ...]:
    """Branches of `run` that finished or diverged."""
    return tuple(
        branch
        for branch in (*plan.branches, *plan.unfinished_branches)
        if _ended_for_itself(branch) and branch.record.parent and branch.record.parent.run == run.record.run
    )


def _ended_for_itself(run: Run) -> bool:
    """Whether nothing outside the training, such as a time limit or a lost machine, ended it."""
    return run.record.status in ("finished", "diverged")


def _diverged(run: Run) -> bool:
    return run.record.status == "diverged"


def training_key(run: Run) -> str:
    """The same for runs that trained the same."""
    config = run.record.config
    fused = recorded_fused(config)
    precision = [run.recipe, run.record.head, config.get("high_precision", []), fused and fused.model_dump()]
    return json.dumps([run.design_settings, precision, run.record.seed], sort_keys=True)


def _in_order(family: Family) -> tuple[int, int]:
    return family.runs[0].parameters, RECIPES.index(family.runs[0].recipe)


def judged_steps(run: Run) -> int | None:
    """Steps whose loss was judged; None where the record does not say."""
    return run.record.stability.judged_steps if run.record.stability else None


def own_steps(run: Run) -> int:
    """Of a decay branch those after its parent's."""
    return run.record.steps - (run.record.parent.step if run.record.parent else 0)


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
