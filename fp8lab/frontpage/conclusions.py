"""What follows from the measurements, each with the figure or table that shows it."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.analysis.decision import Payoff
from fp8lab.analysis.timings import BUSY, device_label, short_device
from fp8lab.claims import OURS
from fp8lab.frontpage.evidence import Evidence
from fp8lab.frontpage.loss import gradient_formats, loss_costs
from fp8lab.frontpage.payoff import times, where, widths_by_tokens
from fp8lab.units import listing, span, unique


def conclusions(evidence: Evidence) -> list[str]:
    """What follows, each with the figure or table that shows it."""
    found = []
    if evidence.payoffs:
        found += [_speed_conclusion(evidence), _memory(evidence), _micro_batches(evidence), _devices(evidence)]
    found += [_head(evidence), _map_conclusion(evidence)]
    costs = loss_costs(evidence)
    if costs:
        found.append(f"**Loss.** {costs.removesuffix('.')} (@fig-gaps).")
    told = [
        f"{row.speedup.text()} with `{row.measured.recipe}` at {row.measured.size} on {short_device(row.device)}"
        for row in evidence.matched
        if row.speedup and row.device
    ]
    if told:
        found.append(f"**Speed at matched loss.** BF16's time over FP8's: {listing(told)} (@tbl-matched).")
    formats = gradient_formats(evidence)
    if formats:
        found.append(f"**Format of gradients.** {formats}")
    return [conclusion for conclusion in found if conclusion]


def _speed_conclusion(evidence: Evidence) -> str:
    if not evidence.with_head("bf16"):
        return ""
    return f"**Speed.** {_by_place(evidence.with_head('bf16'))} ({_shown(evidence, 'throughput')})."


def _shown(evidence: Evidence, name: str) -> str:
    """Reference to the figures of the chapter on speed, which has one a device."""
    devices = unique(evidence.timings[evidence.timings["kind"] == "model"]["device"])
    return listing([f"@fig-{device_label(name, device)}" for device in devices]) if devices else ""


def _map_conclusion(evidence: Evidence) -> str:
    if not evidence.map_payoffs:
        return ""
    said = f"**Speed map**, blocks of four layers. {_by_place(evidence.map_payoffs)} (@fig-switch)."
    for device, cells in evidence.measured_cells:
        waiting = cells[cells["busy"] < BUSY]
        if len(waiting):
            said += (
                f" In {len(waiting)} of {len(cells)} cells on {device} the GPU waited for the host: "
                f"{widths_by_tokens(waiting)} (@fig-break-even-{device.lower()})."
            )
    return said


def _by_place(payoffs: Sequence[Payoff]) -> str:
    """Recipes by where they are faster, device by device."""
    said = []
    for device in unique(payoff.device for payoff in payoffs):
        groups: dict[str, list[str]] = {}
        for payoff in payoffs:
            if payoff.device == device:
                groups.setdefault(where(payoff), []).append(f"`{payoff.recipe}`")
        told = "; ".join(f"{listing(recipes)}: faster {where}" for where, recipes in groups.items())
        said.append(f"On {short_device(device)}, {told}")
    return ". ".join(said)


def _head(evidence: Evidence) -> str:
    """Its speed in FP8 too, with its cost in loss."""
    told = [
        f"on {short_device(payoff.device)} faster than BF16 {where(payoff)}{times(payoff)}"
        for payoff in evidence.with_head("fp8")
        if payoff.recipe == OURS
    ]
    shown = _shown(evidence, "throughput")
    said = [f"With it in FP8 too, `{OURS}` is {'; '.join(told)} ({shown})."] if told else []
    for cost in sorted(evidence.head_costs, key=lambda cost: cost.recipe != OURS):
        said.append(
            f"At {cost.size} it adds {cost.own.text()} to the loss of `{cost.recipe}`, which is then "
            f"{cost.against_bf16.text()} from BF16's (@tbl-{cost.plan})."
        )
    if told and not evidence.head_costs:
        said.append("What it does to the loss is not measured.")
    return " ".join(["**Output head.**", *said]) if said else ""


def _memory(evidence: Evidence) -> str:
    kept: dict[str, list[float]] = {}
    for payoff in evidence.with_head("bf16"):
        kept.setdefault(payoff.recipe, []).extend(evidence.timed(payoff.recipe, payoff.device)["memory_ratio"])
    told = [f"{span(ratios, 2)} with `{recipe}`" for recipe, ratios in kept.items()]
    return f"**GPU memory.** The peak over BF16's: {listing(told)} ({_shown(evidence, 'memory')})." if told else ""


def _micro_batches(evidence: Evidence) -> str:
    if not evidence.with_head("bf16"):
        return ""
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
