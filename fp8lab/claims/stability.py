"""The claim that FP8 trains without trouble, 'almost' to the end: a verdict for each recipe."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab import trouble
from fp8lab.claims.finding import Finding, Verdict
from fp8lab.comparison import LEVEL
from fp8lab.config import RECIPES
from fp8lab.results import RunSet, unique
from fp8lab.trouble import JUDGED, LAST_PART, Family
from fp8lab.units import listing, number

CLAIMED_TOKENS_PER_PARAMETER = 20
STABLE_RUNS = 8
"""Fewest runs without trouble that confirm stability: 8 exclude, at 95%, that a third of such runs would have some."""


def stable_almost_to_the_end(plans: Sequence[RunSet]) -> list[Finding]:
    """FP8 trains without trouble, except perhaps at the very end; a finding a recipe."""
    measured = [plan for plan in plans if plan and not plan.toy]
    recipes = [recipe for recipe in RECIPES[1:] if any(_cells(measured, recipe))]
    if not recipes:
        return [_stability("untested", "No FP8 run was trained on a GPU.", "")]
    return [_recipe_stability(measured, recipe) for recipe in recipes]


def _cells(plans: Sequence[RunSet], recipe: str) -> dict[str, list[Family]]:
    """Families of a recipe by size."""
    sizes = unique(run.size for plan in plans for run in (*plan.runs, *plan.unfinished))
    found = {size: trouble.families(plans, size, recipe) for size in sizes}
    return {size: families for size, families in found.items() if families}


def _recipe_stability(plans: Sequence[RunSet], recipe: str) -> Finding:
    baselines = _cells(plans, "bf16")
    verdicts: dict[str, Verdict] = {}
    told = []
    for size, families in _cells(plans, recipe).items():
        verdicts[size] = _cell_stability(families, baselines.get(size, []))
        told.append(_told(size, families, baselines.get(size, [])))
    longest = max(f.run.record.tokens for families in _cells(plans, recipe).values() for f in families)
    why = f"Runs with trouble before their last tenth: {'; '.join(told)}. The longest saw {number(longest)} tokens."
    for verdict in ("contradicted", "confirmed"):
        sizes = [size for size, of_size in verdicts.items() if of_size == verdict]
        if sizes:
            return _stability(verdict, why, f"`{recipe}` at {listing(sizes)}")
    return _stability("untested", why, f"`{recipe}`")


def _cell_stability(families: Sequence[Family], baselines: Sequence[Family]) -> Verdict:
    early = [family for family in families if family.early_trouble]
    early_bf16 = sum(family.early_trouble for family in baselines)
    bf16_diverged = any(family.diverged for family in baselines)
    excess = trouble.excess_p(len(early), len(families), early_bf16, len(baselines)) if baselines else 1.0
    if excess < 1 - LEVEL or (any(family.diverged for family in early) and baselines and not bf16_diverged):
        return "contradicted"
    complete = [family for family in families if _is_long(family) and family.is_judged]
    return "confirmed" if not early and len(complete) >= STABLE_RUNS else "untested"


def _is_long(family: Family) -> bool:
    # Rounded: 19.9999 tokens a parameter are 20, cut to whole batches.
    return round(family.run.record.tokens / family.run.parameters, 1) >= CLAIMED_TOKENS_PER_PARAMETER


def _told(size: str, families: Sequence[Family], baselines: Sequence[Family]) -> str:
    """What was seen of one size, and how closely it was looked at."""
    count = len(families)
    early, late = sum(f.early_trouble for f in families), sum(f.late_trouble for f in families)
    complete = sum(_is_long(family) and family.is_judged for family in families)
    text = (
        f"{early} of {count} at {size} ({sum(f.early_trouble for f in baselines)} of {len(baselines)} in BF16; {late} "
        f"in the last tenth), where {complete} of {count} were long and judged enough to count"
    )
    if not early and complete:
        text += f", so at most {trouble.most_frequent(complete):.0%} of such runs would have any (95%)"
    return text


def _stability(verdict: Verdict, why: str, scope: str) -> Finding:
    return Finding(
        claim="FP8 training is stable, 'almost' to the end.",
        verdict=verdict,
        why=why,
        rule=(
            "Trouble is a skipped step, a spike of seven standard deviations or a divergence, in a run or its decay "
            f"branches, before the last {LAST_PART:.0%}. For each recipe, contradicted where at some size a run "
            "diverged and none in BF16 did, or runs had trouble more often than BF16's (Fisher's exact test, 5%); "
            f"confirmed at sizes where {STABLE_RUNS} runs or more reached {CLAIMED_TOKENS_PER_PARAMETER} tokens a "
            f"parameter, had {JUDGED:.0%} of their steps judged for spikes, and none had trouble"
        ),
        reference="@tbl-spikes" if scope else "[chapter](chapters/stability.ipynb)",
        scope=scope,
    )
