"""The claim that loss against size is a straight line in logarithms, through four points."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.analysis.runs import RunSet, seed_groups
from fp8lab.analysis.scaling import predict_largest
from fp8lab.analysis.straightness import log_noise, straightness
from fp8lab.claims.finding import Finding, Verdict
from fp8lab.units import signed_percent, unique

CLAIMED_SIZES = 4
LINE_LEVEL = 0.01
"""Points are off a line where their scatter about it is less likely than this from the noise between seeds."""
BEND = 0.1
"""Points are on a line where its exponent is known to change by less than this share from end to end."""


def on_a_line(runs: RunSet, repeated: Sequence[RunSet] = ()) -> Finding:
    """Final loss against size is a straight line in logarithms through four sizes.

    Args:
        runs: the ladder.
        repeated: other plans with runs that differ in seed alone, for the noise: of those tuned as the ladder.
    """
    bf16 = [] if runs.toy else runs.where(recipe="bf16")
    sizes = unique(run.size for run in bf16)
    noise = log_noise(seed_groups([plan for plan in (runs, *repeated) if not plan.toy], bf16[0])) if bf16 else None
    if len(sizes) < CLAIMED_SIZES:
        count = f"{len(sizes) or 'no'} size{'' if len(sizes) == 1 else 's'}"
        return _line("untested", f"BF16 was trained at {count} on a GPU.", sizes)
    if noise is None:
        why = "No size has a second seed, so the noise that points may scatter by is unknown."
        return _line("untested", why, sizes)
    parameters, losses = [run.parameters for run in bf16], [run.validation_loss for run in bf16]
    line, held_out = straightness(parameters, losses, noise), predict_largest(parameters, losses)
    low, high = line.bend_interval
    why = (
        f"A power law through {len(sizes)} sizes, {sizes[0]} to {sizes[-1]}, leaves a scatter with p = "
        f"{line.lack_of_fit_p:.2g} under a noise of {noise.value:.2%} between seeds ({noise.degrees} degrees of "
        f"freedom); its exponent changes by {signed_percent(line.bend)} from end to end ({signed_percent(low)} to "
        f"{signed_percent(high)}); fitted to the smaller ones it misses {sizes[-1]} by "
        f"{signed_percent(held_out.error, 2)}."
    )
    if line.lack_of_fit_p < LINE_LEVEL:
        return _line("contradicted", why, sizes)
    return _line("confirmed" if max(abs(low), abs(high)) < BEND else "untested", why, sizes)


def _line(verdict: Verdict, why: str, sizes: Sequence[str]) -> Finding:
    return Finding(
        claim=f"Loss against size: {CLAIMED_SIZES} points on a line.",
        verdict=verdict,
        why=why,
        rule=(
            f"BF16 at {CLAIMED_SIZES} sizes or more against a power law: contradicted where the sizes scatter about it "
            f"with p < {LINE_LEVEL} (F test for lack of fit, against the scatter between seeds), confirmed where the "
            f"95% interval of the exponent's change from the smallest to the largest size lies within ±{BEND:.0%} of it"
        ),
        reference="@fig-panels" if len(sizes) > 2 else "[chapter](chapters/scaling.ipynb)",
    )
