"""The source article's claims, each held against the records by a rule written here.

A verdict is *confirmed*, *contradicted* or *untested*, and follows from records alone: other records, another
verdict. Toy runs on a CPU decide nothing. `untested` covers what was not measured and what was measured too
coarsely, or too seldom, to tell; the sentence beside it says which. Claims about the loss of FP8 get a verdict for
each recipe, since one recipe's runs say nothing of another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from fp8lab import scores, trouble
from fp8lab.comparison import EQUIVALENCE_MARGIN, LEVEL, holm
from fp8lab.config import RECIPES
from fp8lab.losses import MeasuredGap
from fp8lab.results import RunSet, unique
from fp8lab.rounds import DRIFT, MIN_OCCASIONS, side
from fp8lab.scaling import predict_largest
from fp8lab.straightness import log_noise, straightness
from fp8lab.timings import device_label, short_device
from fp8lab.trouble import JUDGED, LAST_PART, Family
from fp8lab.units import listing, number, signed, signed_percent

Verdict = Literal["confirmed", "contradicted", "untested"]

CLAIMED_TRAININGS = ("125M", "250M", "350M", "1.5B")
"""Sizes that the source article says it trained in both precisions."""
CLAIMED_RATIO = 1.40
"""Tokens a second of FP8 over BF16, at 1.5B."""
CLAIMED_SIZE = "1.5B"
STOCK_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""torchao's, as it ships them: what the report used."""
FAST_VARIANT = "tensorwise_fast"
"""torchao's `tensorwise` with fast accumulation in all three GEMMs, which is not how it ships."""
OURS = "fused"
CLAIMED_TOKENS_PER_PARAMETER = 20
CLAIMED_SIZES = 4
STABLE_RUNS = 8
"""Fewest runs without trouble that confirm stability: 8 exclude, at 95%, that a third of such runs would have some."""
LINE_LEVEL = 0.01
"""Points are off a line where their scatter about it is less likely than this from the noise between seeds."""
BEND = 0.1
"""Points are on a line where its exponent is known to change by less than this share from end to end."""
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
    """What the verdict is about and how far it reaches: '`fused` at 7M'."""
    aside: str = ""
    """What is worth knowing beside it and decides nothing: sentences, Markdown."""


def curves_follow(gaps: Sequence[MeasuredGap]) -> list[Finding]:
    """FP8's loss curves lie on BF16's: judged by the final losses, over seeds; a finding a recipe."""
    if not gaps:
        return [_curves("untested", "No pair of BF16 and FP8 was trained on a GPU.", "")]
    recipes = sorted({measured.recipe for measured in gaps}, key=RECIPES.index)
    return [_curve_follows([measured for measured in gaps if measured.recipe == recipe]) for recipe in recipes]


def _curve_follows(gaps: Sequence[MeasuredGap]) -> Finding:
    """Of one recipe; the p values are adjusted for having asked at several sizes."""
    recipe = f"`{gaps[0].recipe}`"
    judged = [measured for measured in gaps if measured.gap.equivalence_p() is not None and not measured.assumed]
    if not judged:
        return _curves("untested", f"Every gap of {recipe} measured so far is one seed's.", recipe)
    apart = _below_level(judged, [measured.gap.difference_p() or 0.0 for measured in judged])
    equal = _below_level(judged, [measured.gap.equivalence_p() or 0.0 for measured in judged])
    why = "; ".join(
        f"at {m.size} {signed(m.gap.mean)} nats ({signed(m.gap.interval[0])} to {signed(m.gap.interval[1])}, "
        f"{m.gap.seeds} seeds)"
        for m in judged
        if m.gap.interval
    )
    if apart:
        return _curves("contradicted", f"FP8 − BF16 {why}.", f"{recipe} at {listing(apart)}")
    if equal:
        return _curves("confirmed", f"FP8 − BF16 {why}.", f"{recipe} at {listing(equal)}")
    return _curves("untested", f"FP8 − BF16 {why}: too few seeds to tell.", recipe)


def _below_level(judged: Sequence[MeasuredGap], p_values: Sequence[float]) -> list[str]:
    """Sizes at which the adjusted p is below 0.05."""
    return [m.size for m, p in zip(judged, holm(p_values), strict=True) if p < 1 - LEVEL]


def _curves(verdict: Verdict, why: str, scope: str) -> Finding:
    return Finding(
        claim="FP8's loss curve follows BF16's.",
        verdict=verdict,
        why=why,
        rule=(
            f"For each recipe, contradicted where its final gap is beyond ±{EQUIVALENCE_MARGIN} nats at some size, "
            "else confirmed at the sizes where two one-sided tests put it within; all at 5%, adjusted for the number "
            "of sizes (Holm); gaps of one seed decide nothing"
        ),
        reference="@fig-gaps" if scope else "[chapter](chapters/stability.ipynb)",
        scope=scope,
    )


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


def forty_percent(timings: pd.DataFrame) -> Finding:
    """Stock FP8 trains the largest model 40% faster."""
    timed = timings[_at_claimed_size(timings)] if len(timings) else timings
    ours = timed[timed["recipe"] == OURS] if len(timed) else timed
    stock = timed[timed["recipe"].isin(STOCK_RECIPES)] if len(timed) else timed
    if stock.empty:
        verdict: Verdict = "untested"
        why = f"No torchao recipe was timed at {CLAIMED_SIZE}."
    else:
        verdict = _speed_verdict(stock)
        told = _by_device(stock, lambda row: _stock_text(row, timed))
        why = f"torchao's fastest recipe as it ships gave, over BF16's tokens/s, {told}"
        count = _occasion_count(stock)
        why += f", {count} occasions in all." if count >= MIN_OCCASIONS else ", not confirmed yet: one occasion."
    return Finding(
        claim=f"FP8 trains 40% faster at {CLAIMED_SIZE}.",
        verdict=verdict,
        why=why,
        rule=(
            f"By the 95% interval of torchao's recipes as they ship, at {CLAIMED_SIZE} with the head in BF16: "
            f"contradicted where none reaches {CLAIMED_RATIO:.2f}, confirmed where one lies above on one device "
            f"without drifting by more than {DRIFT:.0%}; either takes {MIN_OCCASIONS} occasions, and those that "
            "contradict may be of several devices"
        ),
        reference=listing([f"@fig-{device_label('throughput', device)}" for device in unique(stock["device"])])
        if len(stock)
        else "[chapter](chapters/throughput.ipynb)",
        aside=f"This project's `{OURS}` gave {_by_device(ours, _ours_text)}." if len(ours) else "",
    )


def _at_claimed_size(timings: pd.DataFrame) -> pd.Series:
    return (timings["model"] == CLAIMED_SIZE) & (timings["head"] == "bf16") & (timings["kind"] == "model")


def _speed_verdict(stock: pd.DataFrame) -> Verdict:
    """From rows of `timings.with_verdicts`, all recipes and devices."""
    if any(is_confirmed(row) for _, row in stock.iterrows()):
        return "confirmed"
    none_reaches = (stock["interval_high"] < CLAIMED_RATIO).all()
    return "contradicted" if none_reaches and _occasion_count(stock) >= MIN_OCCASIONS else "untested"


def is_confirmed(row: Mapping[str, float] | pd.Series) -> bool:
    """Whether a ratio is known to reach the claimed one: above it, steady, on more than one occasion."""
    above = side(row["interval_low"], row["interval_high"], CLAIMED_RATIO) == "above"
    return bool(above and not _lacks(row))


def _lacks(row: Mapping[str, float] | pd.Series) -> str:
    """What keeps a ratio from being settled, in words; empty where nothing does."""
    said = []
    if row["occasions"] < MIN_OCCASIONS:
        said.append("one occasion")
    if row["interval_low"] != row["interval_low"]:
        said.append("too few rounds for an interval")
    if abs(row["drift"]) > DRIFT:
        moved = "fell" if row["drift"] < 0 else "rose"
        said.append(f"its rounds {moved} from {row['first']:.2f} to {row['last']:.2f}")
    return " and ".join(said)


def _by_device(rows: pd.DataFrame, text: Callable[[pd.Series], str]) -> str:
    """`text` of the fastest of `rows` on each device."""
    fastest = [own.sort_values("ratio").iloc[-1] for _, own in rows.groupby("device", sort=False)]
    return listing([text(row) for row in fastest])


def _stock_text(row: pd.Series, timed: pd.DataFrame) -> str:
    """torchao's fastest recipe on one device, as it ships, with the fast variant of the same process beside it."""
    is_beside = (timed["device"] == row["device"]) & (timed["setting"] == row["setting"])
    fast = timed[is_beside & (timed["recipe"] == FAST_VARIANT)]
    beside = f"; {fast['ratio'].iloc[0]:.2f} with fast accumulation in all GEMMs" if len(fast) else ""
    return f"{_ratio_text(row)} on {short_device(row['device'])} (`{row['recipe']}`{beside})"


def _occasion_count(rows: pd.DataFrame) -> int:
    return int(rows.groupby("device")["occasions"].max().sum())


def _ours_text(row: pd.Series) -> str:
    where = side(row["interval_low"], row["interval_high"], CLAIMED_RATIO)
    standing = {"above": "which reaches it", "below": "which does not", "undecided": "which may or may not reach it"}
    lacks = _lacks(row)
    told = f"{_ratio_text(row)} on {short_device(row['device'])}, "
    if where == "above" and lacks:
        return f"{told}above it so far but not confirmed ({lacks})"
    return told + standing[where] + (f" ({lacks})" if lacks else "")


def _ratio_text(row: pd.Series) -> str:
    if row["interval_low"] != row["interval_low"]:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} ({row['interval_low']:.2f} to {row['interval_high']:.2f})"


def on_a_line(runs: RunSet, repeated: Sequence[RunSet] = ()) -> Finding:
    """Final loss against size is a straight line in logarithms through four sizes.

    Args:
        runs: the ladder.
        repeated: other plans of BF16 runs that differ in seed alone, for the noise.
    """
    bf16 = [] if runs.toy else runs.where(recipe="bf16")
    sizes = unique(run.size for run in bf16)
    noise = log_noise(_alike([runs, *repeated]))
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


def _alike(plans: Sequence[RunSet]) -> list[list[float]]:
    """Losses of BF16 runs on GPUs that differ in their seed alone, a group a plan and kind of run."""
    groups: dict[tuple[object, ...], dict[str, float]] = {}
    for plan in plans:
        for run in [] if plan.toy else plan.where(recipe="bf16"):
            groups.setdefault((plan.plan, *run.kind), {})[run.record.run] = run.validation_loss
    return [list(group.values()) for group in groups.values()]


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


def barely_above_guessing(runs: RunSet) -> Finding:
    """A small model of one's own is barely above guessing on the usual tasks."""
    tasks = _leads(runs) if runs and not runs.toy else pd.DataFrame()
    if tasks.empty:
        return _barely("untested", "No model trained on a GPU was scored.", "", "@tbl-published")
    above = tasks[tasks["lead"] >= BARELY].sort_values("lead", ascending=False)
    barely = len(tasks) - len(above)
    exceptions = listing([f"{task} by {100 * lead:.0f} points" for task, lead in above["lead"].items()] or ["none"])
    below = [str(task) for task in tasks.index[tasks["lead"] < -2 * tasks["stderr"]]]
    why = (
        f"Of {len(tasks)} tasks, {tasks.attrs['size']} lies less than {100 * BARELY:.0f} points above guessing on "
        f"{barely}; above that: {exceptions}." + (f" On {listing(below)} it lies below guessing." if below else "")
    )
    verdict: Verdict = "confirmed" if barely > len(tasks) / 2 else "contradicted"
    agreeing = barely if verdict == "confirmed" else len(above)
    return _barely(verdict, why, f"on {agreeing} of {len(tasks)} tasks", "@fig-scores")


def _leads(runs: RunSet) -> pd.DataFrame:
    """Accuracy above guessing by task, in its usual metric: means over the scored runs of the largest size."""
    known = scores.usual_accuracies(runs).dropna(subset=["random_guess", "stderr"])
    largest = [size for size in runs.sizes if size in set(known["size"])][-1:]
    of_largest = known[known["size"].isin(largest)]
    leads = of_largest.assign(lead=of_largest["value"] - of_largest["random_guess"])
    table = leads.groupby("task", sort=False)[["lead", "stderr"]].mean()
    table.attrs["size"] = listing(largest) if largest else ""
    return table


def _barely(verdict: Verdict, why: str, scope: str, reference: str) -> Finding:
    return Finding(
        claim="A small model of one's own scores barely above guessing.",
        verdict=verdict,
        why=why,
        rule=(
            "By each task's usual accuracy, of the largest model scored: confirmed where it is less than "
            f"{100 * BARELY:.0f} points above guessing on more than half of the tasks, the others named, contradicted "
            "otherwise"
        ),
        reference=reference,
        scope=scope,
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
    """Every claim, in the source article's order; one about each recipe where the claim is about FP8's loss.

    Args:
        gaps: `losses.measured_gaps`.
        stability: every plan trained on GPUs, of which those with seeds also tell the noise about a line.
        timings: `timings.with_verdicts`; empty where nothing was timed.
        ladder: the runs with most sizes.
        scored: the runs with scores.
    """
    return [
        *curves_follow(gaps),
        *stable_almost_to_the_end(stability),
        forty_percent(timings),
        on_a_line(ladder, stability),
        barely_above_guessing(scored),
        other_models(),
    ]
