"""The claim that FP8's loss curve follows BF16's: a verdict for each recipe, since one says nothing of another."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.analysis.comparison import EQUIVALENCE_MARGIN, LEVEL, holm
from fp8lab.analysis.losses import MeasuredGap, left_out
from fp8lab.claims.finding import Finding, Verdict
from fp8lab.config import RECIPES
from fp8lab.units import listing, p_value


def curves_follow(gaps: Sequence[MeasuredGap]) -> list[Finding]:
    """FP8's loss curves lie on BF16's: judged by the final losses, over seeds; a finding a recipe."""
    if not gaps:
        return [_curves("untested", "No pair of BF16 and FP8 finished training on a GPU.", "")]
    recipes = sorted({measured.recipe for measured in gaps}, key=RECIPES.index)
    return [_curve_follows([measured for measured in gaps if measured.recipe == recipe]) for recipe in recipes]


def _curve_follows(gaps: Sequence[MeasuredGap]) -> Finding:
    """Of one recipe; the p values are adjusted for having asked at several sizes."""
    recipe, lost = f"`{gaps[0].recipe}`", left_out(gaps)
    judged = [measured for measured in gaps if measured.has_seeds and measured.gap.equivalence_p() is not None]
    if not judged:
        return _curves("untested", f"Every gap of {recipe} measured so far is one seed's. {lost}".strip(), recipe)
    apart = _below_level(judged, holm([measured.gap.difference_p() or 0.0 for measured in judged]))
    equivalence = holm([measured.gap.equivalence_p() or 0.0 for measured in judged])
    equal = _below_level(judged, equivalence)
    told = "; ".join(
        f"at {measured.size} {measured.gap.text()}, p beyond ±{EQUIVALENCE_MARGIN}: {p_value(p)}"
        for measured, p in zip(judged, equivalence, strict=True)
    )
    why = f"FP8 − BF16 {told}. {lost}".strip()
    if apart:
        return _curves("contradicted", why, f"{recipe} at {listing(apart)}")
    if not equal:
        return _curves("untested", f"FP8 − BF16 {told}: too few seeds to tell. {lost}".strip(), recipe)
    # Runs that are left after others diverged may follow BF16's for that reason alone.
    whole = [measured.size for measured in judged if measured.size in equal and not measured.diverged]
    if not whole:
        return _curves("untested", f"{why} Those that are left confirm nothing.", recipe)
    return _curves("confirmed", why, f"{recipe} at {listing(whole)}")


def _below_level(judged: Sequence[MeasuredGap], p_values: Sequence[float]) -> list[str]:
    """Sizes at which p is below 0.05."""
    return [m.size for m, p in zip(judged, p_values, strict=True) if p < 1 - LEVEL]


def _curves(verdict: Verdict, why: str, scope: str) -> Finding:
    return Finding(
        claim="FP8's loss curve follows BF16's.",
        verdict=verdict,
        why=why,
        rule=(
            f"For each recipe, contradicted where its final gap is beyond ±{EQUIVALENCE_MARGIN} nats at some size, "
            "else confirmed at the sizes where two one-sided tests put it within and no FP8 run diverged; all at 5%, "
            "adjusted for the number of sizes (Holm); gaps of one seed decide nothing"
        ),
        reference="@fig-gaps" if scope else "[chapter](chapters/stability.ipynb)",
        scope=scope,
    )
