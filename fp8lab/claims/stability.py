"""The claim that FP8 trains without trouble, 'almost' to the end: a verdict for each recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fp8lab.analysis import trouble
from fp8lab.analysis.comparison import LEVEL, holm
from fp8lab.analysis.runs import RunSet
from fp8lab.analysis.trouble import JUDGED, LAST_PART, Family
from fp8lab.claims.finding import Finding, Verdict
from fp8lab.config import RECIPES
from fp8lab.units import listing, number

CLAIMED_TOKENS_PER_PARAMETER = 20
STABLE_RUNS = 8
"""Fewest runs without trouble that confirm stability: 8 exclude, at 95%, that a third of such runs would have some."""


def stable_almost_to_the_end(plans: Sequence[RunSet]) -> list[Finding]:
    """FP8 trains without trouble, except perhaps at the very end; a finding a recipe."""
    found = trouble.families([plan for plan in plans if plan and not plan.toy])
    by_recipe = {
        recipe: {size: families for (size, name), families in found.items() if name == recipe} for recipe in RECIPES
    }
    baselines = by_recipe.pop("bf16")
    measured = [(recipe, by_size) for recipe, by_size in by_recipe.items() if by_size]
    if not measured:
        return [_stability("untested", "No FP8 run was trained on a GPU.", "")]
    return [_recipe_stability(recipe, by_size, baselines) for recipe, by_size in measured]


def _recipe_stability(
    recipe: str, by_size: Mapping[str, Sequence[Family]], baselines: Mapping[str, Sequence[Family]]
) -> Finding:
    """Of one recipe; the p values are adjusted for having asked at several sizes."""
    pairs = {size: (families, baselines.get(size, [])) for size, families in by_size.items()}
    excess = holm([_excess_p(families, bf16) for families, bf16 in pairs.values()])
    verdicts = {size: _verdict(pairs[size][0], p) for size, p in zip(pairs, excess, strict=True)}
    told = "; ".join(_told(size, families, bf16) for size, (families, bf16) in pairs.items())
    longest = max(family.tokens for families in by_size.values() for family in families)
    why = f"Runs with trouble before their last tenth: {told}. The longest saw {number(longest)} tokens."
    for verdict in ("contradicted", "confirmed"):
        sizes = [size for size, of_size in verdicts.items() if of_size == verdict]
        if sizes:
            return _stability(verdict, why, f"`{recipe}` at {listing(sizes)}")
    return _stability("untested", why, f"`{recipe}`")


def _excess_p(families: Sequence[Family], baselines: Sequence[Family]) -> float:
    early, early_bf16 = (sum(family.early_trouble for family in side) for side in (families, baselines))
    return trouble.excess_p(early, len(families), early_bf16, len(baselines))


def _verdict(families: Sequence[Family], excess_p: float) -> Verdict:
    """Of one size."""
    if excess_p < 1 - LEVEL:
        return "contradicted"
    untroubled = not any(family.early_trouble for family in families)
    return "confirmed" if untroubled and sum(map(_counts, families)) >= STABLE_RUNS else "untested"


def _counts(family: Family) -> bool:
    """Whether it was long and judged enough for no trouble to say something."""
    return family.tokens_per_parameter >= CLAIMED_TOKENS_PER_PARAMETER and family.is_judged


def _told(size: str, families: Sequence[Family], baselines: Sequence[Family]) -> str:
    """What was seen of one size, and how closely it was looked at."""
    count = len(families)
    early, late = sum(f.early_trouble for f in families), sum(f.late_trouble for f in families)
    complete, diverged = sum(map(_counts, families)), sum(family.diverged for family in families)
    text = (
        f"{early} of {count} at {size} ({sum(f.early_trouble for f in baselines)} of {len(baselines)} in BF16; "
        f"{f'{diverged} diverged; ' if diverged else ''}{late} in the last tenth)"
    )
    if complete < count:
        text += f", where {complete} of {count} were long and judged enough to count"
    # Of fewer the bound would say nothing.
    if not early and complete >= STABLE_RUNS:
        text += f", so at most {trouble.most_frequent(complete):.0%} of such runs would have any (95%)"
    return text


def _stability(verdict: Verdict, why: str, scope: str) -> Finding:
    return Finding(
        claim="FP8 training is stable, 'almost' to the end.",
        verdict=verdict,
        why=why,
        rule=(
            "Trouble is a skipped step, a spike of seven standard deviations or a divergence, in a run or its decay "
            f"branches, before the last {LAST_PART:.0%}; runs that differ in nothing but their plan count as one. For "
            "each recipe, contradicted where at some size runs had trouble more often than BF16's (Fisher's exact "
            "test at 5%, adjusted for the number of sizes by Holm); confirmed at sizes where "
            f"{STABLE_RUNS} runs or more reached {CLAIMED_TOKENS_PER_PARAMETER} tokens a parameter, had "
            f"{JUDGED:.0%} of their steps judged for spikes, and none had trouble"
        ),
        reference="@tbl-spikes" if scope else "[chapter](chapters/stability.ipynb)",
        scope=scope,
    )
