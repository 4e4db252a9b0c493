"""The first page's sentences: the answer, the setting, the conclusions, each from records.

Every clause has its condition: other records, other words. What the records cannot carry is said to be untested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fp8lab import claims, decision, losses, slopes
from fp8lab.article import scale_note
from fp8lab.claims import OURS
from fp8lab.config import MODELS
from fp8lab.decision import Matched, Payoff
from fp8lab.losses import MeasuredGap
from fp8lab.results import (
    MAP_PLAN,
    SPEED_COMMAND,
    Run,
    RunSet,
    SpeedRun,
    plan_runs,
    scored_runs,
    speed_runs,
    training_runs,
    unique,
)
from fp8lab.rounds import MIN_OCCASIONS
from fp8lab.slopes import FittedLaw
from fp8lab.timings import device_label, short_device, with_verdicts
from fp8lab.units import listing, signed


@dataclass(frozen=True)
class Evidence:
    """All that the first page draws on."""

    runs: RunSet
    """The runs that the article shows."""
    others: tuple[Run, ...]
    """Runs that a verdict, a score or a gap of the page rests on besides: of other plans, and decay branches."""
    speeds: list[SpeedRun]
    """Of whole models, and of the speed map's blocks."""
    timings: pd.DataFrame
    """`timings.with_verdicts`; empty where nothing was timed on a GPU."""
    payoffs: list[Payoff]
    """Of whole models."""
    map_payoffs: list[Payoff]
    """Of the speed map's blocks."""
    matched: list[Matched]
    laws: list[FittedLaw]
    findings: list[claims.Finding]

    @classmethod
    def read(cls, records_dir: Path) -> Evidence:
        """Everything from a folder of records."""
        runs = training_runs(records_dir)
        speeds = [*speed_runs(records_dir), *speed_runs(records_dir, MAP_PLAN)]
        timings = with_verdicts(speeds) if speeds else pd.DataFrame(columns=["kind", "device", "recipe", "head"])
        sets = losses.measured_sets(records_dir)
        laws = slopes.known_laws(sets)
        matched = decision.loss_matched(sets, laws, timings)
        plans = [plan_runs(records_dir, plan) for plan in losses.GAP_PLANS]
        ladder = training_runs(records_dir, suits=lambda found: len(found.sizes) > 2) or runs
        scored = scored_runs(records_dir)
        return cls(
            runs=runs,
            others=tuple(
                run for plan in (*plans, ladder, scored) if not plan.toy for run in (*plan.runs, *plan.branches)
            ),
            speeds=speeds,
            timings=timings,
            payoffs=decision.payoffs(timings[timings["kind"] == "model"]),
            map_payoffs=decision.payoffs(timings[timings["kind"] == "blocks"]),
            matched=matched,
            laws=laws,
            findings=claims.scoreboard(
                gaps=[row.measured for row in matched],
                stability=plans,
                timings=timings,
                ladder=ladder,
                scored=scored,
            ),
        )

    @property
    def devices(self) -> str:
        """Where speed was measured."""
        return listing(unique(self.timings["device"]))

    def with_head(self, head: str, device: str | None = None) -> list[Payoff]:
        """Payoffs of whole models, of one device or all."""
        return [payoff for payoff in self.payoffs if payoff.head == head and device in (None, payoff.device)]

    def timed(self, recipe: str, device: str, head: str = "bf16") -> pd.DataFrame:
        """Timings of whole models in one recipe on one device, by width and then tokens a micro-batch."""
        rows = self.timings[
            (self.timings["recipe"] == recipe)
            & (self.timings["head"] == head)
            & (self.timings["device"] == device)
            & (self.timings["kind"] == "model")
        ]
        return rows.sort_values(["width", "micro_batch_tokens"], kind="stable")


def lead(evidence: Evidence) -> str:
    """The first paragraph: which recipe pays at which widths, and which never; what is contradicted; the loss."""
    parts = [_answer(evidence), _contradictions(evidence), _costs(evidence), _matched(evidence)]
    return " ".join(part for part in parts if part)


def _answer(evidence: Evidence) -> str:
    """The plain result on each device, the one with most settings first."""
    timed = evidence.with_head("bf16")
    if not timed and evidence.map_payoffs:
        return "**No whole model was timed for this edition**, only the blocks of the speed map (@fig-switch)."
    if not timed:
        return f"**No speed was measured for this edition**: FP8 ran emulated. `{SPEED_COMMAND}` measures it on a GPU."
    devices = unique(payoff.device for payoff in timed)
    devices.sort(key=lambda device: -max(payoff.settings for payoff in evidence.with_head("bf16", device)))
    on_devices = [_on_device(evidence.with_head("bf16", device), introduce=device == devices[0]) for device in devices]
    said = [f"**{' '.join(on_devices)}**"]
    once = sum(payoff.occasions < MIN_OCCASIONS for payoff in timed)
    if once:
        which = "None of this" if once == len(timed) else "Not all of this"
        said.append(f"{which} has been confirmed by a second occasion.")
    return " ".join(said)


def _on_device(recipes: Sequence[Payoff], *, introduce: bool) -> str:
    """One device's sentence.

    Args:
        introduce: whether the recipes are spoken of for the first time.
    """
    ours = next((payoff for payoff in recipes if payoff.recipe == OURS), None)
    stock = next((payoff for payoff in recipes if payoff.recipe in claims.STOCK_RECIPES), None)
    never = [payoff for payoff in recipes if payoff.never and payoff not in (ours, stock)]
    said = []
    if ours:
        who = f"`{OURS}`, this project's kernels," if introduce else f"`{OURS}`"
        said.append(f"{who} trains faster than BF16 {_where(ours)}{_times(ours)}")
    if stock:
        does = "" if ours else " trains faster than BF16"
        said.append(f"stock torchao{does} {_where(stock)}{_times(stock)}, by `{stock.recipe}`")
    said += [f"`{payoff.recipe}` {_where(payoff)}" for payoff in never]
    contexts = [f"{context:,}" for context in sorted({one for payoff in recipes for one in payoff.contexts})]
    return f"On {short_device(recipes[0].device)}, in contexts of {listing(contexts)} tokens, {'; '.join(said)}."


def _where(payoff: Payoff) -> str:
    """The widths at which a recipe is known to be faster: what was timed, and nothing beyond."""
    others = [
        f"{name} at {listing([f'{width:,}' for width in widths])}"
        for name, widths in (("slower", payoff.slower), ("undecided", payoff.undecided))
        if widths
    ]
    beside = f" ({', '.join(others)})" if others else ""
    first, last = payoff.widths[0], payoff.widths[-1]
    if payoff.never:
        return f"at no width timed{beside}"
    if payoff.pays_from is None:
        return f"at {payoff.faster} of {payoff.settings} settings timed{beside}"
    if first == last:
        return f"at {last:,}, the only width timed"
    if payoff.everywhere:
        return f"at every width timed, {first:,} to {last:,}"
    if payoff.pays_from == last:
        return f"at width {last:,} alone{beside}"
    if any(width < payoff.pays_from for width in payoff.slower):
        return f"from width {payoff.pays_from:,} on{beside}"
    return f"at widths {payoff.pays_from:,} to {last:,}{beside}"


def _times(payoff: Payoff) -> str:
    return f", {_span([payoff.slowest, payoff.fastest])} times its tokens/s"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _contradictions(evidence: Evidence) -> str:
    """What the report claims and these records contradict."""
    told = [
        f"*{finding.claim}* {finding.scope + ': ' if finding.scope else ''}{finding.why}"
        for finding in evidence.findings
        if finding.verdict == "contradicted"
    ]
    if not told:
        return ""
    return f"Of what the report behind this project claims, contradicted here (@tbl-scoreboard): {' '.join(told)}"


def _costs(evidence: Evidence) -> str:
    """What is known of the cost in loss, of each recipe at its size with most seeds."""
    telling = _most_seeds(evidence.matched)
    if not telling:
        return ""
    unclear = [measured for measured in telling if not _excludes_zero(measured)]
    clear = [measured for measured in telling if _excludes_zero(measured)]
    said = []
    if clear:
        said.append(f"FP8 moves the loss by more than these seeds leave open: {listing([*map(_gap, clear)])}.")
    if unclear:
        said.append(f"What FP8 costs in loss these runs cannot tell from nothing: {listing([*map(_gap, unclear)])}.")
    return " ".join(said)


def _most_seeds(matched: Sequence[Matched]) -> list[MeasuredGap]:
    """A gap a recipe: of most seeds, and of the largest size among those."""
    found = []
    for recipe in unique(row.measured.recipe for row in matched):
        of_recipe = [row.measured for row in matched if row.measured.recipe == recipe]
        most = max(measured.gap.seeds for measured in of_recipe)
        found.append([measured for measured in of_recipe if measured.gap.seeds == most][-1])
    return found


def _excludes_zero(measured: MeasuredGap) -> bool:
    return measured.gap.excludes_zero and not measured.assumed


def _gap(measured: MeasuredGap) -> str:
    gap = measured.gap
    spread = "one seed"
    if gap.interval is not None and not measured.assumed:
        spread = f"{signed(gap.interval[0])} to {signed(gap.interval[1])}, {gap.seeds} seeds"
    return f"{signed(gap.mean)} nats/token ({spread}) with `{measured.recipe}` at {measured.size}"


def _matched(evidence: Evidence) -> str:
    known = [row for row in evidence.matched if row.speedup and row.speedup.interval]
    if known:
        best = max(known, key=lambda row: (row.measured.recipe == OURS, row.measured.gap.seeds))
        assert best.speedup
        assert best.device
        how = "; one seed, its scatter assumed" if best.measured.assumed else ""
        return (
            f"At matched loss `{best.measured.recipe}` is {best.speedup.text()} times as fast as BF16 at "
            f"{best.measured.size} on {short_device(best.device)} (@tbl-matched{how})."
        )
    return _affordable(evidence)


def _affordable(evidence: Evidence) -> str:
    """What loss the speed of the widest model would pay for, where a law reaches that far."""
    rows = evidence.timings[(evidence.timings["recipe"] == OURS) & (evidence.timings["head"] == "bf16")]
    rows = rows[rows["model"].isin(list(MODELS)) & (rows["verdict"] == "faster")] if len(rows) else rows
    if rows.empty:
        return ""
    widest = rows.sort_values(["width", "ratio"]).iloc[-1]
    nats = decision.affordable_gap(widest["model"], widest["interval_low"], evidence.laws)
    said = "No size was both timed and trained with seeds enough, so the speed-up at matched loss is untested"
    if nats is None:
        return f"{said}."
    return (
        f"{said}; by a law of other data, the lower end of the speed of `{OURS}` at {widest['model']} on "
        f"{short_device(widest['device'])} would pay for a loss up to {nats:.3f} nats higher."
    )


def setting(evidence: Evidence) -> str:
    """The second paragraph: what was measured on what, and what the report did that is only planned here."""
    said = [_trained(evidence)]
    if evidence.speeds:
        said.append(f"Speed was measured on {evidence.devices}.")
    said.append(
        f"The report says that it trained {listing(claims.CLAIMED_TRAININGS)} in both precisions; here those trainings "
        "are [planned for H100s](chapters/approach.ipynb#what-is-planned), and nothing planned is drawn as measured."
    )
    return " ".join(said)


def _trained(evidence: Evidence) -> str:
    """Devices, sizes and the longest time of every run that the page rests on."""
    if evidence.runs.toy and not evidence.others:
        return scale_note(evidence.runs)
    runs = evidence.others or evidence.runs.runs
    sizes: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.parameters):
        sizes.setdefault(run.record.provenance.device_name, []).append(run.size)
    where = [f"{device} ({listing(unique(own))} parameters)" for device, own in sorted(sizes.items())]
    longest = max((run.record.speed.wall_seconds for run in runs if run.record.speed), default=0.0) / 60
    text = f"Losses and scores were measured here on {listing(where)}; no run took longer than {longest:.1f} minutes."
    return f"{scale_note(evidence.runs)} {text}" if evidence.runs.toy else text


def conclusions(evidence: Evidence) -> list[str]:
    """What follows, each with the figure or table that shows it."""
    found = []
    if evidence.payoffs:
        found += [_speed_conclusion(evidence), _memory(evidence), _micro_batches(evidence)]
        found += [_head(evidence), _devices(evidence)]
    found.append(_map_conclusion(evidence))
    costs = _costs(evidence)
    if costs:
        found.append(f"**Loss.** {costs.removesuffix('.')} (@fig-gaps).")
    told = [
        f"{row.speedup.text()} with `{row.measured.recipe}` at {row.measured.size} on {short_device(row.device)}"
        for row in evidence.matched
        if row.speedup and row.device
    ]
    if told:
        found.append(f"**Speed at matched loss.** BF16's time over FP8's: {listing(told)} (@tbl-matched).")
    return [conclusion for conclusion in found if conclusion]


def _speed_conclusion(evidence: Evidence) -> str:
    return f"**Speed.** {_by_place(evidence.with_head('bf16'))} ({_shown(evidence, 'throughput')})."


def _shown(evidence: Evidence, name: str) -> str:
    """Reference to a figure of the chapter on speed, which has one a device; of several, to the table of all."""
    devices = unique(evidence.timings[evidence.timings["kind"] == "model"]["device"])
    return f"@fig-{device_label(name, devices[0])}" if len(devices) == 1 else "@tbl-switch"


def _map_conclusion(evidence: Evidence) -> str:
    if not evidence.map_payoffs:
        return ""
    return f"**Speed map**, blocks of four layers. {_by_place(evidence.map_payoffs)} (@fig-switch)."


def _by_place(payoffs: Sequence[Payoff]) -> str:
    """Recipes by where they are faster, device by device."""
    said = []
    for device in unique(payoff.device for payoff in payoffs):
        groups: dict[str, list[str]] = {}
        for payoff in payoffs:
            if payoff.device == device:
                groups.setdefault(_where(payoff), []).append(f"`{payoff.recipe}`")
        told = "; ".join(f"{listing(recipes)}: faster {where}" for where, recipes in groups.items())
        said.append(f"On {short_device(device)}, {told}")
    return ". ".join(said)


def _head(evidence: Evidence) -> str:
    told = [
        f"on {short_device(payoff.device)} faster than BF16 {_where(payoff)}{_times(payoff)}"
        for payoff in evidence.with_head("fp8")
        if payoff.recipe == OURS
    ]
    shown = _shown(evidence, "throughput")
    return f"**Output head.** With it in FP8 too, `{OURS}` is {'; '.join(told)} ({shown})." if told else ""


def _memory(evidence: Evidence) -> str:
    kept: dict[str, list[float]] = {}
    for payoff in evidence.with_head("bf16"):
        kept.setdefault(payoff.recipe, []).extend(evidence.timed(payoff.recipe, payoff.device)["memory_ratio"])
    told = [f"{_span(ratios)} with `{recipe}`" for recipe, ratios in kept.items()]
    return f"**GPU memory.** The peak over BF16's: {listing(told)} ({_shown(evidence, 'memory')})."


def _micro_batches(evidence: Evidence) -> str:
    told = []
    for payoff in evidence.with_head("bf16"):
        if payoff.recipe != OURS:
            continue
        for (width, context), group in evidence.timed(OURS, payoff.device).groupby(["width", "seq_len"], sort=False):
            few, many = group.iloc[0], group.iloc[-1]
            if few["micro_batch_tokens"] < many["micro_batch_tokens"]:
                told.append(
                    f"{few['ratio']:.2f} at {few['micro_batch_tokens']:,} and {many['ratio']:.2f} at "
                    f"{many['micro_batch_tokens']:,} at width {width:,}, context {context:,}, on "
                    f"{short_device(payoff.device)}"
                )
    said = (
        f"`{OURS}` over BF16: {'; '.join(told)}"
        if told
        else "Each width was timed with one micro-batch on a device, so their influence on whole models is untested"
    )
    return f"**Tokens a micro-batch.** {said} (@tbl-switch)."


def _devices(evidence: Evidence) -> str:
    """Settings that were timed on several devices."""
    rows = evidence.timings[
        (evidence.timings["recipe"] == OURS)
        & (evidence.timings["head"] == "bf16")
        & (evidence.timings["kind"] == "model")
    ]
    both = rows.pivot_table(index="setting", columns="device", values="ratio", sort=False)
    both = both.dropna() if len(both.columns) > 1 else both.iloc[:0]
    told = [
        f"{listing([f'{ratio:.2f} on {device}' for device, ratio in row.items()])} at {setting}"
        for setting, row in both.iterrows()
    ]
    return f"**Device.** `{OURS}` over BF16: {'; '.join(told)} (@tbl-switch)." if told else ""


VERDICTS = ("contradicted", "confirmed", "untested")
"""In the order of the scoreboard."""


def scoreboard(findings: Sequence[claims.Finding]) -> str:
    """The claims as a Markdown table, contradictions first: verdict, numbers, where to see them; then the rules."""
    rows = "\n".join(
        f"| {finding.claim} | **{finding.verdict}** {finding.scope} | "
        f"{' '.join(part for part in (finding.why, finding.aside) if part)} ({finding.reference}) |"
        for finding in sorted(findings, key=lambda finding: VERDICTS.index(finding.verdict))
    )
    rules = "\n".join(unique(f"- *{finding.claim}* {finding.rule}." for finding in findings))
    return (
        "::: {.table-text}\n\n"
        "| the report says | here | because |\n"
        "|:----------------|:-----------|:---------------------------|\n"
        f"{rows}\n\n"
        ": The claims of the report that prompted this project, held against our records by the rules below. "
        "{#tbl-scoreboard}\n\n:::\n\n"
        f"A verdict follows from the records by these rules:\n\n{rules}"
    )
