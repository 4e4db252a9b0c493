"""Losses of runs, ready to be compared: final losses, and gaps to BF16.

Frames have plain column names and raw numbers; `fp8lab.tables` and `fp8lab.figures` show them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from fp8lab.analysis import numerics, variance
from fp8lab.analysis.comparison import Deviation, Gap
from fp8lab.analysis.laws import JointLaw
from fp8lab.analysis.runs import (
    LARGER_PLAN,
    MEASURED_PLANS,
    SEEDS_PLAN,
    Run,
    RunSet,
    known_scatter,
    plan_runs,
    source_of,
)
from fp8lab.analysis.trouble import training_key
from fp8lab.config import RECIPES
from fp8lab.units import listing, unique


def final_losses(runs: RunSet) -> pd.DataFrame:
    """Every final validation loss, those of decay branches included, as scaling laws are fitted to them.

    Returns:
        Columns: size, recipe, seed, run (the stable run; its branches share it), is_branch, budget (tokens a
        parameter), parameters (N, total), non_embedding, matmul, tokens, steps, loss (nats a token), bits_per_byte, and
        training FLOPs by convention: flops_6n, flops_matmul_attention, flops_causal.
    """
    rows = []
    for run in (*runs.runs, *runs.branches):
        record = run.record
        rows.append(
            {
                "size": run.size,
                "recipe": run.recipe,
                "seed": record.seed,
                "run": record.parent.run if record.parent else record.run,
                "is_branch": record.parent is not None,
                "budget": round(record.tokens / run.parameters, 1),
                "parameters": run.parameters,
                "non_embedding": record.parameters.non_embedding,
                "matmul": record.parameters.matmul,
                "tokens": record.tokens,
                "steps": record.steps,
                "loss": run.validation_loss,
                "bits_per_byte": run.bits_per_byte,
                "flops_6n": record.flops.per_token_6n * record.tokens,
                "flops_matmul_attention": record.flops.per_token_matmul_attention * record.tokens,
                "flops_causal": record.flops.per_token_matmul_attention_causal * record.tokens,
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["parameters", "recipe", "seed", "tokens"], key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Recipes as `config.RECIPES` has them; anything else as it is."""
    return column.map(RECIPES.index) if column.name == "recipe" else column


def domain_gaps(runs: RunSet, size: str) -> dict[tuple[str, str], Gap]:
    """Bits per byte of each FP8 recipe minus BF16's by (domain, recipe), on that domain's validation text."""
    domains = list(runs.where(size=size, recipe="bf16")[0].by_domain)

    def gap(domain: str, recipe: str) -> Gap:
        return runs.gap(size, recipe, lambda run: run.by_domain[domain].bits_per_byte)

    recipes = [recipe for recipe in runs.recipes if recipe != "bf16" and runs.where(size=size, recipe=recipe)]
    return {(domain, recipe): gap(domain, recipe) for domain in domains for recipe in recipes}


def gaps_by_budget(
    points: pd.DataFrame, law: JointLaw, fitted: pd.DataFrame, scatter: Deviation | None
) -> pd.DataFrame:
    """Loss of each FP8 recipe minus BF16's at the same size and budget, meaned over the sizes.

    Args:
        points: `final_losses`, of the recipes that `law` knows.
        fitted: those that `law` was fitted to.
        scatter: of seeds, for the 95% intervals.

    Returns:
        A row a recipe and budget. Columns: recipe, budget (tokens a parameter), mean, reach (half-width of its 95%
        interval; NaN without `scatter`), by_law (the same by the joint law; NaN where it was not fitted to all of
        them); nats a token.
    """
    points = points.assign(law=pd.Series(law.of(fitted), fitted.index))
    rows = []
    for recipe in law.multipliers:
        sides = [points[points["recipe"] == name].groupby(["budget", "size"]) for name in (recipe, "bf16")]
        loss, by_law = (sides[0][column].mean() - sides[1][column].mean() for column in ("loss", "law"))
        runs = pd.concat([side.size() for side in sides], axis=1, join="inner")
        for budget, at_budget in loss.dropna().groupby("budget"):
            counts = [(int(ours), int(bf16)) for ours, bf16 in runs.loc[at_budget.index].to_numpy()]
            rows.append(
                {
                    "recipe": recipe,
                    "budget": budget,
                    "mean": float(at_budget.mean()),
                    "reach": scatter.reach_of_mean(counts) if scatter else float("nan"),
                    "by_law": float(by_law[at_budget.index].mean(skipna=False)),
                }
            )
    return pd.DataFrame(rows, columns=["recipe", "budget", "mean", "reach", "by_law"])


GAP_PLANS = (SEEDS_PLAN, *MEASURED_PLANS, LARGER_PLAN)
"""Plans whose runs a loss gap may come from; of a size in several, the one with most seeds counts, then the first."""


def measured_sets(records_dir: Path) -> list[RunSet]:
    """The plans of `GAP_PLANS` that were trained on a GPU, their gaps in pairs where those are known to help.

    After them the designs of the variance study, whose own gaps are never taken in pairs: it chose.
    """
    study = variance.study(records_dir)
    plans = [variance.with_pairs(plan_runs(records_dir, plan), study) for plan in GAP_PLANS]
    return [runs for runs in (*plans, *numerics.designs(records_dir, study)) if runs and not runs.toy]


@dataclass(frozen=True)
class MeasuredGap:
    """What a recipe cost in loss at one size."""

    size: str
    recipe: str
    gap: Gap
    runs: RunSet
    assumed: bool = False
    """Whether the gap's interval is assumed: one seed, taken to scatter as repeated runs of its size or smaller do."""
    diverged: int = 0
    """Runs of this size and recipe, of all plans, tuned alike, that diverged: the gap is that of those left."""
    bf16_diverged: int = 0

    @property
    def has_seeds(self) -> bool:
        """Whether its interval is measured."""
        return self.gap.interval is not None and not self.assumed

    @property
    def named(self) -> str:
        """`Run.named` of the FP8 runs."""
        return self.runs.where(size=self.size, recipe=self.recipe)[0].named

    @property
    def baseline(self) -> Run:
        """One of the BF16 runs."""
        return self.runs.where(size=self.size, recipe="bf16")[0]

    def text(self, unit: str = "nats") -> str:
        """As prose has it, with its interval where seeds gave one."""
        gap = replace(self.gap, interval=None) if self.assumed else self.gap
        return f"{gap.text(unit)} with {self.named} at {self.size}"


def telling(gaps: Sequence[MeasuredGap]) -> list[MeasuredGap]:
    """Of each recipe the gaps over several seeds, and that of the largest size whatever its seeds."""
    found = []
    for recipe in unique(measured.recipe for measured in gaps):
        of_recipe = [measured for measured in gaps if measured.recipe == recipe]
        found += [measured for measured in of_recipe if measured.has_seeds or measured is of_recipe[-1]]
    return found


def tuned_as(ladder: RunSet, sets: Sequence[RunSet], gaps: Sequence[MeasuredGap]) -> list[MeasuredGap]:
    """The same gaps at the ladder's learning rate, where `gaps` have another and several seeds tell: maybe none.

    What FP8 costs depends on the learning rate, and many seeds are trained at the rate where they scatter least.
    """
    found = []
    for measured in gaps:
        likes = ladder.where(size=measured.size, recipe="bf16")
        if not likes or not measured.has_seeds or not _differ_in_rate_alone(measured.baseline, likes[0]):
            continue
        others = [
            _measured_gap(sets, runs, measured.size, measured.recipe)
            for runs in sets
            if (measured.size, measured.recipe) in runs.gaps()
        ]
        alike = [one for one in others if one.has_seeds and one.baseline.tuning == likes[0].tuning]
        alike = [one for one in alike if _as_long(one.baseline, likes[0])]
        found += sorted(alike, key=lambda one: -one.gap.seeds)[:1]
    return found


def _as_long(run: Run, other: Run) -> bool:
    """Whether they saw as many tokens, to a step or so."""
    return math.isclose(run.record.tokens, other.record.tokens, rel_tol=0.01)


def _differ_in_rate_alone(run: Run, other: Run) -> bool:
    rate = {"peak_learning_rate": 0.0}
    tunings = [one.tuning | {"optimizer": one.tuning["optimizer"] | rate} for one in (run, other)]
    return _as_long(run, other) and run.tuning != other.tuning and tunings[0] == tunings[1]


def measured_gaps(sets: Sequence[RunSet]) -> list[MeasuredGap]:
    """The gap of every size and recipe, from the plan that has most seeds of it, then the first; small sizes first.

    All that the article says of a gap, on the first page and in the chapters, comes from this list.

    Args:
        sets: `measured_sets` or, where nothing was trained on a GPU, the demo's runs alone.
    """
    best: dict[tuple[str, str], RunSet] = {}
    seen: set[tuple[str, str, str]] = set()
    for runs in sets:
        for key, gap in runs.gaps().items():
            # Of one plan's designs the first counts.
            is_first = (runs.plan, *key) not in seen
            seen.add((runs.plan, *key))
            if key not in best or (is_first and gap.seeds > best[key].gap(*key).seeds):
                best[key] = runs
    found = [_measured_gap(sets, runs, *key) for key, runs in best.items()]
    return sorted(found, key=lambda one: (one.runs.where(size=one.size)[0].parameters, RECIPES.index(one.recipe)))


def sources(gaps: Sequence[MeasuredGap]) -> str:
    """What a caption says about where the runs behind `gaps` were trained, and which of them diverged."""
    return f"{source_of([measured.runs for measured in gaps])} {left_out(gaps)}".strip()


def left_out(gaps: Sequence[MeasuredGap]) -> str:
    """A sentence about the runs that diverged and so have no part in `gaps`; empty where none did."""
    counts = unique(
        f"{count} of `{recipe}` at {measured.size}"
        for measured in gaps
        for recipe, count in ((measured.recipe, measured.diverged), ("bf16", measured.bf16_diverged))
        if count
    )
    return f"Runs that diverged and are in no mean: {listing(counts)}." if counts else ""


def _measured_gap(sets: Sequence[RunSet], runs: RunSet, size: str, recipe: str) -> MeasuredGap:
    gap, bf16 = runs.gap(size, recipe), runs.where(size=size, recipe="bf16")[0]
    scatter = known_scatter(sets, bf16) if gap.interval is None else None
    diverged, bf16_diverged = (_diverged(sets, bf16, name) for name in (recipe, "bf16"))
    measured = MeasuredGap(size, recipe, gap, runs, diverged=diverged, bf16_diverged=bf16_diverged)
    if scatter is None:
        return measured
    return replace(measured, gap=replace(gap, interval=gap.assumed_interval(scatter)), assumed=True)


def _diverged(sets: Sequence[RunSet], like: Run, recipe: str) -> int:
    """Trainings in `recipe`, otherwise like `like`, that diverged; one that several plans have counts once."""
    unfinished = [run for runs in sets for run in runs.unfinished if (run.size, run.recipe) == (like.size, recipe)]
    diverged = [run for run in unfinished if run.record.status == "diverged" and run.tuning == like.tuning]
    return len({training_key(run) for run in diverged})
