"""The first page's sentences: the answer, the setting, the conclusions, each from records.

Every clause has its condition: other records, other words. What the records cannot carry is said to be untested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fp8lab import claims, decision, losses
from fp8lab.article import scale_note
from fp8lab.config import MODELS, load_plan
from fp8lab.decision import Matched, Payoff
from fp8lab.losses import MeasuredGap
from fp8lab.results import SPEED_COMMAND, RunSet, SpeedRun, plan_runs, scored_runs, speed_runs, training_runs, unique
from fp8lab.timings import device_label, with_verdicts
from fp8lab.units import listing, signed

OURS = "fused"


@dataclass(frozen=True)
class Evidence:
    """All that the first page draws on."""

    runs: RunSet
    """The runs that the article shows."""
    speeds: list[SpeedRun]
    timings: pd.DataFrame
    """`timings.with_verdicts`; empty where nothing was timed on a GPU."""
    payoffs: list[Payoff]
    matched: list[Matched]
    findings: list[claims.Finding]

    @classmethod
    def read(cls, records_dir: Path) -> Evidence:
        """Everything from a folder of records."""
        runs, speeds = training_runs(records_dir), speed_runs(records_dir)
        timings = with_verdicts(speeds) if speeds else pd.DataFrame()
        matched = decision.loss_matched(records_dir, speeds)
        return cls(
            runs=runs,
            speeds=speeds,
            timings=timings,
            payoffs=decision.payoffs(timings) if speeds else [],
            matched=matched,
            findings=claims.scoreboard(
                gaps=[row.measured for row in matched],
                stability=[plan_runs(records_dir, plan) for plan in losses.GAP_PLANS],
                timings=timings,
                ladder=training_runs(records_dir, suits=lambda found: len(found.sizes) > 2) or runs,
                scored=scored_runs(records_dir),
            ),
        )

    @property
    def devices(self) -> str:
        """Where speed was measured."""
        return listing(unique(self.timings["device"]))

    def with_head(self, head: str) -> list[Payoff]:
        return [payoff for payoff in self.payoffs if payoff.head == head]

    def timed(self, recipe: str, head: str = "bf16") -> pd.DataFrame:
        """Timings of one recipe, by width and then tokens a micro-batch."""
        rows = self.timings[(self.timings["recipe"] == recipe) & (self.timings["head"] == head)]
        return rows.sort_values(["width", "micro_batch_tokens"], kind="stable")


def lead(evidence: Evidence) -> str:
    """The first paragraph: which recipe pays from which width on, and which never; the report's claim; the loss."""
    parts = [_answer(evidence), _claim(evidence), _costs(evidence), _matched(evidence)]
    return " ".join(part for part in parts if part)


def _answer(evidence: Evidence) -> str:
    recipes = evidence.with_head("bf16")
    if not recipes:
        return f"**No speed was measured for this edition**: FP8 ran emulated. `{SPEED_COMMAND}` measures it on a GPU."
    ours = next((payoff for payoff in recipes if payoff.recipe == OURS), None)
    stock = next((payoff for payoff in recipes if payoff.recipe in claims.STOCK_RECIPES), None)
    never = [f"`{payoff.recipe}`" for payoff in recipes if payoff.never and payoff not in (ours, stock)]
    said = []
    if ours:
        said.append(f"`{OURS}`, this project's kernels, trains faster than BF16 {_where(ours)} ({_times(ours)})")
    if stock:
        does = "" if ours else " trains faster than BF16"
        said.append(f"stock torchao{does} {_where(stock)} (`{stock.recipe}`, {_times(stock)})")
    if never:
        said.append(f"{listing(never)} at no width timed")
    first = "; ".join(said)
    return f"**{first[0].upper()}{first[1:]}.**"


def _where(payoff: Payoff) -> str:
    if payoff.pays_from is not None:
        return f"from width {payoff.pays_from:,} on"
    return "at no width timed" if payoff.never else f"at {payoff.faster} of {payoff.settings} settings timed"


def _times(payoff: Payoff, whose: str = "its") -> str:
    return f"{_span([payoff.slowest, payoff.fastest])} times {whose} tokens/s"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _claim(evidence: Evidence) -> str:
    finding = claims.forty_percent(evidence.timings)
    if finding.verdict == "untested":
        return ""
    said = "does not hold" if finding.verdict == "contradicted" else "holds"
    return (
        f"The gain of {claims.CLAIMED_RATIO - 1:.0%} at {claims.CLAIMED_SIZE} that the report behind this project "
        f"claims {said} here: {finding.why}"
    )


def _costs(evidence: Evidence) -> str:
    """What is known of the cost in loss, of each recipe at its size with most seeds."""
    telling = _most_seeds(evidence.matched)
    if not telling:
        return ""
    unclear = [measured for measured in telling if not _excludes_zero(measured)]
    clear = [measured for measured in telling if _excludes_zero(measured)]
    said = []
    if clear:
        said.append(f"It moves the loss by more than the noise between seeds: {listing([*map(_gap, clear)])}.")
    if unclear:
        said.append(f"What it costs in loss these runs cannot tell from nothing: {listing([*map(_gap, unclear)])}.")
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
        how = "; one seed, its scatter assumed" if best.measured.assumed else ""
        return (
            f"At matched loss `{best.measured.recipe}` is {best.speedup.text()} times as fast as BF16 at "
            f"{best.measured.size} (@tbl-matched{how})."
        )
    rows = evidence.timed(OURS) if evidence.speeds else evidence.timings
    rows = rows[rows["model"].isin(list(MODELS)) & (rows["ratio"] > 1)] if len(rows) else rows
    if rows.empty:
        return ""
    widest = rows.iloc[-1]
    return (
        "No size was both timed and trained with several seeds, so the speed-up at matched loss is untested; by a "
        f"published law, the speed of `{OURS}` at {widest['model']} would pay for a loss up to "
        f"{decision.affordable_gap(widest['model'], widest['ratio']):.3f} nats higher."
    )


def setting(evidence: Evidence, plan: Path) -> str:
    """The second paragraph: what was measured on what, and what the report did that is only planned here.

    Args:
        plan: the source article's sizes as a plan.
    """
    runs, said = evidence.runs, []
    if runs.toy:
        said.append(scale_note(runs))
    else:
        devices = listing(unique(run.record.provenance.device_name for run in runs.runs))
        longest = max(run.record.speed.wall_seconds for run in runs.runs if run.record.speed) / 60
        said.append(
            f"Losses were measured here on {devices}, with {listing(runs.sizes)} parameters, and no run took longer "
            f"than {longest:.0f} minutes."
        )
    if evidence.speeds:
        said.append(f"Speed was measured on {evidence.devices}.")
    if plan.exists():
        sizes = listing(unique(config.model.name for config in load_plan(plan).runs))
        said.append(
            f"The report trained {sizes}; those trainings are "
            "[planned for H100s](chapters/approach.ipynb#what-is-planned), and nothing planned is drawn as measured."
        )
    return " ".join(said)


def conclusions(evidence: Evidence) -> list[str]:
    """What follows, each with the figure or table that shows it."""
    found = []
    if evidence.speeds:
        found += [_speed_conclusion(evidence), _memory(evidence), _micro_batches(evidence)]
        found += [_head(evidence), _devices(evidence)]
    costs = _costs(evidence)
    if costs:
        found.append(f"**Loss.** {costs.removesuffix('.')} (@fig-gaps).")
    speedups = [row for row in evidence.matched if row.speedup]
    if speedups:
        told = [
            f"{row.speedup.text()} with `{row.measured.recipe}` at {row.measured.size}"
            for row in speedups
            if row.speedup
        ]
        found.append(f"**Speed at matched loss.** BF16's time over FP8's: {listing(told)} (@tbl-matched).")
    return [conclusion for conclusion in found if conclusion]


def _speed_conclusion(evidence: Evidence) -> str:
    groups: dict[str, list[str]] = {}
    for payoff in evidence.with_head("bf16"):
        groups.setdefault(_where(payoff), []).append(f"`{payoff.recipe}`")
    return (
        "**Speed.** "
        + "; ".join(f"{listing(recipes)}: faster {where}" for where, recipes in groups.items())
        + f" ({_shown(evidence, 'throughput')})."
    )


def _shown(evidence: Evidence, name: str) -> str:
    """Reference to a figure of the chapter on speed, which has one a device; of several, to the table of all."""
    devices = unique(evidence.timings["device"])
    return f"@fig-{device_label(name, devices[0])}" if len(devices) == 1 else "@tbl-switch"


def _head(evidence: Evidence) -> str:
    head = next((payoff for payoff in evidence.with_head("fp8") if payoff.recipe == OURS), None)
    if head is None:
        return ""
    gain = _times(head, "BF16's")
    shown = _shown(evidence, "throughput")
    return f"**Output head.** With it in FP8 too, `{OURS}` is faster {_where(head)}, {gain} ({shown})."


def _memory(evidence: Evidence) -> str:
    kept = [
        f"{_span(list(evidence.timed(payoff.recipe)['memory_ratio']))} with `{payoff.recipe}`"
        for payoff in evidence.with_head("bf16")
    ]
    return f"**GPU memory.** The peak over BF16's: {listing(kept)} ({_shown(evidence, 'memory')})."


def _micro_batches(evidence: Evidence) -> str:
    recipe = evidence.with_head("bf16")[0].recipe
    told = []
    for (_, width), group in evidence.timed(recipe).groupby(["device", "width"], sort=False):
        few, many = group.iloc[0], group.iloc[-1]
        if few["micro_batch_tokens"] < many["micro_batch_tokens"]:
            told.append(
                f"{few['ratio']:.2f} at {few['micro_batch_tokens']:,} and {many['ratio']:.2f} at "
                f"{many['micro_batch_tokens']:,} at width {width:,}"
            )
    said = (
        f"`{recipe}` over BF16: {'; '.join(told)}"
        if told
        else "Each width was timed with one micro-batch, so their influence is untested here"
    )
    return f"**Tokens a micro-batch.** {said} (@tbl-switch)."


def _devices(evidence: Evidence) -> str:
    """Settings that were timed on several devices."""
    rows = evidence.timed(OURS)
    both = rows.pivot_table(index="setting", columns="device", values="ratio", sort=False)
    both = both.dropna() if len(both.columns) > 1 else both.iloc[:0]
    told = [
        f"{listing([f'{ratio:.2f} on {device}' for device, ratio in row.items()])} at {setting}"
        for setting, row in both.iterrows()
    ]
    return f"**Device.** `{OURS}` over BF16: {'; '.join(told)} (@tbl-switch)." if told else ""


def scoreboard(findings: Sequence[claims.Finding]) -> str:
    """The claims as a Markdown table: verdict, numbers, and where to see them; then the rules."""
    rows = "\n".join(
        f"| {finding.claim} | **{finding.verdict}** {finding.scope} | {finding.why} ({finding.reference}) |"
        for finding in findings
    )
    rules = "\n".join(f"- *{finding.claim}* {finding.rule}." for finding in findings)
    return (
        "::: {.table-text}\n\n"
        "| the report says | here | because |\n"
        "|:----------------|:-----------|:---------------------------|\n"
        f"{rows}\n\n"
        ": The claims of the report that prompted this project, held against our records by the rules below. "
        "{#tbl-scoreboard}\n\n:::\n\n"
        f"A verdict follows from the records by these rules:\n\n{rules}"
    )
