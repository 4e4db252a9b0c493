"""The source article's claims, each held against the records by a rule written here.

A verdict is *confirmed*, *contradicted* or *untested*, and follows from records alone: other records, another
verdict. Toy runs on a CPU decide nothing. `untested` covers what was not measured and what was measured too
coarsely to tell; the sentence beside it says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from fp8lab import scores
from fp8lab.comparison import EQUIVALENCE_MARGIN, LEVEL
from fp8lab.losses import MeasuredGap
from fp8lab.results import Run, RunSet, seed_deviation, unique
from fp8lab.scaling import predict_largest
from fp8lab.spikes import spikes
from fp8lab.timings import device_label
from fp8lab.units import listing, number, signed, signed_percent

Verdict = Literal["confirmed", "contradicted", "untested"]

CLAIMED_RATIO = 1.40
"""Tokens a second of FP8 over BF16, at 1.5B."""
CLAIMED_SIZE = "1.5B"
STOCK_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""torchao's, as it ships them: what the report used."""
LAST_PART = 0.1
"""Share of a run that is its end, for 'almost to the end'."""
CLAIMED_TOKENS_PER_PARAMETER = 20
CLAIMED_SIZES = 4
LINE_LEVEL = 0.01
"""Points are off a line where their scatter about it is less likely than this from the noise between seeds."""
BARELY = 0.05
"""Accuracy above guessing that is still 'barely' above it."""


@dataclass(frozen=True)
class Finding:
    """A claim, what the records say of it, and where to see it."""

    claim: str
    verdict: Verdict
    why: str
    """The numbers behind the verdict, as a sentence: Markdown."""
    rule: str
    """What decides, whatever the records say: Markdown."""
    reference: str
    """Where to see it: '@fig-gaps', or a link to the chapter where there is nothing to draw yet."""
    scope: str = ""
    """How far the verdict reaches: 'at 7M'."""


def curves_follow(gaps: Sequence[MeasuredGap]) -> Finding:
    """FP8's loss curves lie on BF16's: judged by the final losses, over seeds."""
    verdicts = [_within_margin(measured) for measured in gaps]
    judged = [measured for measured, verdict in zip(gaps, verdicts, strict=True) if verdict != "untested"]
    if "contradicted" in verdicts:
        verdict: Verdict = "contradicted"
    else:
        verdict = "confirmed" if "confirmed" in verdicts else "untested"
    if not gaps:
        why = "No pair of BF16 and FP8 was trained on a GPU."
    elif verdict == "untested":
        widest = [m.gap.interval[1] - m.gap.interval[0] for m in gaps if m.gap.interval and not m.assumed]
        why = (
            "Every gap measured so far is one seed's."
            if not widest
            else f"The narrowest interval of a gap is ±{min(widest) / 2:.3f} nats wide: too few seeds to tell."
        )
    else:
        why = (
            "; ".join(
                f"`{m.recipe}` at {m.size}: {signed(m.gap.mean)} nats ({signed(m.gap.interval[0])} to "
                f"{signed(m.gap.interval[1])}, {m.gap.seeds} seeds)"
                for m in judged
                if m.gap.interval
            )
            + "."
        )
    return Finding(
        claim="FP8's loss curve follows BF16's.",
        verdict=verdict,
        why=why,
        rule=(
            f"Confirmed where two one-sided tests put a final gap within ±{EQUIVALENCE_MARGIN} nats and no interval "
            "lies outside, contradicted where one does; gaps of one seed decide nothing"
        ),
        reference="@fig-gaps" if gaps else "[chapter](chapters/stability.ipynb)",
        scope="" if verdict == "untested" else f"at {listing(unique(measured.size for measured in judged))}",
    )


def _within_margin(measured: MeasuredGap) -> Verdict:
    gap = measured.gap
    if gap.interval is None or measured.assumed:
        return "untested"
    low, high = gap.interval
    if low > EQUIVALENCE_MARGIN or high < -EQUIVALENCE_MARGIN:
        return "contradicted"
    equivalence = gap.equivalence_p()
    return "confirmed" if equivalence is not None and equivalence < 1 - LEVEL else "untested"


def stable_almost_to_the_end(plans: Sequence[RunSet]) -> Finding:
    """FP8 trains without trouble, except perhaps at the very end."""
    runs = [
        run
        for plan in plans
        if not plan.toy
        for run in (*plan.runs, *(run for run in plan.unfinished if run.record.status == "diverged"))
        if run.recipe != "bf16"
    ]
    early = [run for run in runs if (share := first_trouble(run)) is not None and share < 1 - LAST_PART]
    late = [run for run in runs if (share := first_trouble(run)) is not None and share >= 1 - LAST_PART]
    reached = max((run.record.tokens / run.parameters for run in runs), default=0.0)
    if early:
        verdict: Verdict = "contradicted"
        why = (
            f"{len(early)} of {len(runs)} FP8 runs diverged, skipped a step or spiked before their last tenth, "
            f"`{early[0].record.run}` for one."
        )
    elif not runs:
        verdict, why = "untested", "No FP8 run was trained on a GPU."
    else:
        # Rounded: 19.9999 tokens a parameter are 20, cut to whole batches.
        verdict = "confirmed" if round(reached, 1) >= CLAIMED_TOKENS_PER_PARAMETER else "untested"
        longest = max(runs, key=lambda run: run.record.tokens)
        why = (
            f"None of {len(runs)} FP8 runs, up to {reached:.1f} tokens a parameter, diverged, skipped a step or spiked "
            "before its last tenth"
            + (f"; {len(late)} did in it" if late else ", nor in it: we see no 'almost'")
            + f". The longest saw {number(longest.record.tokens)} tokens, at {longest.size}."
        )
    return Finding(
        claim="FP8 training is stable, 'almost' to the end.",
        verdict=verdict,
        why=why,
        rule=(
            "Contradicted where an FP8 run diverged, skipped a step or had a spike of seven standard deviations before "
            "its last tenth; confirmed, for the sizes trained, where none did and one reached "
            f"{CLAIMED_TOKENS_PER_PARAMETER} tokens a parameter"
        ),
        reference="@tbl-spikes" if runs else "[chapter](chapters/stability.ipynb)",
        scope="" if verdict == "untested" else f"at {listing(unique(run.size for run in runs))}",
    )


def first_trouble(run: Run) -> float | None:
    """Share of the run done when it first skipped a step, spiked or diverged; None where it never did.

    0 where the record says that it did and no logged step shows when.
    """
    record = run.record
    metrics = run.metrics
    bad = metrics["skipped"].astype(bool) | ~np.isfinite(metrics["loss"]) | (spikes(metrics["loss"]) == 1)
    planned = int(record.config["tokens"])
    if bad.any():
        return float(metrics["tokens"][bad].iloc[0]) / planned
    stability = record.stability
    if stability and stability.first_bad_step is not None:
        return stability.first_bad_step * record.global_batch_tokens / planned
    troubled = record.status == "diverged" or (stability and (stability.skipped_steps or stability.spike_score))
    return 0.0 if troubled else None


def forty_percent(timings: pd.DataFrame) -> Finding:
    """Stock FP8 trains the largest model 40% faster."""
    at_size = timings[timings["model"] == CLAIMED_SIZE] if len(timings) else timings
    stock = at_size[at_size["recipe"].isin(STOCK_RECIPES) & (at_size["head"] == "bf16")] if len(at_size) else at_size
    if stock.empty:
        verdict: Verdict = "untested"
        why = f"No torchao recipe was timed at {CLAIMED_SIZE}."
    else:
        best = stock.sort_values("ratio").iloc[-1]
        if best["low"] >= CLAIMED_RATIO:
            verdict = "confirmed"
        else:
            verdict = "contradicted" if (stock["high"] < CLAIMED_RATIO).all() else "untested"
        why = (
            f"torchao's fastest recipe there, `{best['recipe']}`, gave {_ratio_text(best)} times BF16's tokens/s on "
            f"{best['device']}."
        )
        ours = at_size[(at_size["recipe"] == "fused") & (at_size["head"] == "bf16")]
        if len(ours):
            row = ours.sort_values("ratio").iloc[-1]
            reaches = "reaches it" if row["low"] >= CLAIMED_RATIO else "does not reach it in every round"
            why += f" This project's `fused` {reaches}: {_ratio_text(row)}."
    return Finding(
        claim=f"FP8 trains 40% faster at {CLAIMED_SIZE}.",
        verdict=verdict,
        why=why,
        rule=(
            f"Confirmed where the fastest of torchao's recipes at {CLAIMED_SIZE} reached {CLAIMED_RATIO:.2f} in every "
            "round, contradicted where none did in any"
        ),
        reference="[chapter](chapters/throughput.ipynb)"
        if stock.empty
        else f"@fig-{device_label('throughput', best['device'])}",
    )


def _ratio_text(row: pd.Series) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def on_a_line(runs: RunSet) -> Finding:
    """Final loss against size is a straight line in logarithms through four sizes."""
    claim = f"Loss against size: {CLAIMED_SIZES} points on a line."
    rule = (
        f"BF16 at {CLAIMED_SIZES} sizes or more against a power law: contradicted where their scatter about it has "
        f"p < {LINE_LEVEL} under the noise between seeds, confirmed otherwise"
    )
    bf16 = [] if runs.toy else runs.where(recipe="bf16")
    sizes = unique(run.size for run in bf16)
    deviation = seed_deviation([runs])
    if len(sizes) < CLAIMED_SIZES or deviation is None:
        lacking = (
            f"BF16 was trained at {len(sizes) or 'no'} size{'' if len(sizes) == 1 else 's'} on a GPU."
            if len(sizes) < CLAIMED_SIZES
            else "No size has a second seed, so the noise that points may scatter by is unknown."
        )
        reference = "@fig-panels" if len(sizes) > 2 else "[chapter](chapters/scaling.ipynb)"
        return Finding(claim, "untested", lacking, rule, reference)
    p = line_fit_p([run.parameters for run in bf16], [run.validation_loss for run in bf16], deviation.value)
    held_out = predict_largest([run.parameters for run in bf16], [run.validation_loss for run in bf16])
    why = (
        f"A power law through {len(sizes)} sizes, {sizes[0]} to {sizes[-1]}, leaves a scatter with p = {p:.2g} under a "
        f"noise of {deviation.value:.4f} nats between seeds; fitted to the smaller ones it misses {sizes[-1]} by "
        f"{signed_percent(held_out.error, 2)}."
    )
    return Finding(claim, "contradicted" if p < LINE_LEVEL else "confirmed", why, rule, "@fig-panels")


def line_fit_p(parameters: Sequence[float], losses: Sequence[float], noise: float) -> float:
    """How likely a scatter about the best power law is, at least as large as this, from noise alone.

    Args:
        noise: standard deviation of one loss (nats).

    Returns:
        The upper tail of chi-square at the weighted sum of squared residuals, two constants fitted.
    """
    x, y = np.log(np.asarray(parameters, float)), np.log(np.asarray(losses, float))
    weight = np.asarray(losses, float) / noise
    slope, intercept = np.polyfit(x, y, 1, w=weight)
    statistic = float((((y - slope * x - intercept) * weight) ** 2).sum())
    return float(stats.chi2.sf(statistic, len(x) - 2))


def barely_above_guessing(runs: RunSet) -> Finding:
    """A small model of one's own is barely above guessing on the usual tasks."""
    table = scores.of_runs(runs) if runs and not runs.toy else pd.DataFrame(columns=["metric"])
    known = table[table["metric"].isin(("acc", "acc_norm"))]
    known = known.dropna(subset=["random_guess", "stderr"]) if len(known) else known
    if known.empty:
        verdict: Verdict = "untested"
        why = "No model trained on a GPU was scored."
    else:
        lead = known["value"] - known["random_guess"]
        verdict = "confirmed" if lead.median() < BARELY else "contradicted"
        why = (
            f"{int((lead > 2 * known['stderr']).sum())} of {len(known)} accuracies of "
            f"{listing(unique(known['size']))} lie more than two standard errors above guessing; the median lies "
            f"{lead.median():+.1%} from it."
        )
    return Finding(
        claim="A small model of one's own scores barely above guessing.",
        verdict=verdict,
        why=why,
        rule=f"Confirmed where the median accuracy is less than {BARELY:.0%} above guessing, contradicted otherwise",
        reference="@fig-scores" if len(known) else "@tbl-published",
    )


def other_models() -> Finding:
    """What the report says of other people's models: not run here."""
    return Finding(
        claim="Remarks on Llama's and Qwen's scores.",
        verdict="untested",
        why="We ran none of these models; their published scores stand beside the remarks.",
        rule="It would need our own scores of those models",
        reference="@tbl-published",
    )


def scoreboard(
    *,
    gaps: Sequence[MeasuredGap],
    stability: Sequence[RunSet],
    timings: pd.DataFrame,
    ladder: RunSet,
    scored: RunSet,
) -> list[Finding]:
    """Every claim, in the source article's order.

    Args:
        gaps: `losses.measured_gaps`.
        stability: every plan trained on GPUs.
        timings: `timings.with_verdicts`; empty where nothing was timed.
        ladder: the runs with most sizes.
        scored: the runs with scores.
    """
    return [
        curves_follow(gaps),
        stable_almost_to_the_end(stability),
        forty_percent(timings),
        on_a_line(ladder),
        barely_above_guessing(scored),
        other_models(),
    ]
