"""The first paragraphs: the answer, what it rests on, and what is less certain of the cost in loss."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab import claims
from fp8lab.analysis.decision import Payoff
from fp8lab.analysis.occasions import SPEED_COMMAND
from fp8lab.analysis.rounds import MIN_OCCASIONS
from fp8lab.analysis.timings import BUSY, short_device
from fp8lab.article import scale_note
from fp8lab.claims import OURS
from fp8lab.frontpage.evidence import Evidence
from fp8lab.frontpage.loss import clear_costs, speed_at_matched_loss, starts, unclear_costs
from fp8lab.frontpage.payoff import times, where, widths_by_tokens
from fp8lab.units import listing, span, unique


def lead(evidence: Evidence) -> str:
    """The first paragraph: which recipe pays at which widths, and which never; what is contradicted; the loss."""
    loss = clear_costs(evidence) or unclear_costs(evidence)
    return " ".join(part for part in (_answer(evidence), _contradictions(evidence), loss) if part)


def costs(evidence: Evidence) -> str:
    """Two paragraphs, each maybe empty: what is left of the loss and what the speed is worth; how models start."""
    rest = unclear_costs(evidence) if clear_costs(evidence) else ""
    trained = " ".join(part for part in (rest, speed_at_matched_loss(evidence)) if part)
    return "\n\n".join(part for part in (trained, starts(evidence)) if part)


def _answer(evidence: Evidence) -> str:
    """The plain result on each device, the one with most settings first."""
    timed = evidence.with_head("bf16")
    if not timed and evidence.payoffs:
        return "**No recipe was timed with its output head in BF16**, only with that in FP8 too (@tbl-switch)."
    if not timed and evidence.map_payoffs:
        return "**No whole model was timed for this edition**, only the blocks of the speed map (@fig-switch)."
    if not timed:
        how = _how_fp8_ran(evidence)
        return f"**No speed was measured for this edition**{how}. `{SPEED_COMMAND}` measures it on a GPU."
    devices = unique(payoff.device for payoff in timed)
    devices.sort(key=lambda device: -max(payoff.settings for payoff in evidence.with_head("bf16", device)))
    on_devices = [_on_device(evidence.with_head("bf16", device), introduce=device == devices[0]) for device in devices]
    said = [f"**{' '.join(on_devices)}**"]
    said += _short_steps(evidence)
    once = sum(payoff.occasions < MIN_OCCASIONS for payoff in timed)
    if once:
        which = "None of this" if once == len(timed) else "Not all of this"
        said.append(f"{which} has been confirmed by a second occasion.")
    return " ".join(said)


def _short_steps(evidence: Evidence) -> list[str]:
    """A sentence a device whose map has cells where ours is slower: whole models were timed with long steps alone."""
    said = []
    for device, cells in evidence.measured_cells:
        own = cells[cells["recipe"] == OURS]
        slower = own[own["high"] < 1]
        if len(slower):
            waits = ", while the GPU waits for the host" if (slower["busy"] < BUSY).all() else ""
            said.append(
                f"Short steps are another matter: in blocks of four layers `{OURS}` gives "
                f"{span(slower['measured'], 2)} times BF16's tokens/s in {len(slower)} of {len(own)} settings on "
                f"{device}{waits}: {widths_by_tokens(slower)} (@fig-break-even-{device.lower()})."
            )
    return said


def _how_fp8_ran(evidence: Evidence) -> str:
    """Whether the runs of the page could have been timed; nothing where none trained in FP8."""
    fp8 = [run for run in (*evidence.runs.runs, *evidence.others) if run.recipe != "bf16"]
    if not fp8:
        return ""
    emulated = all(run.record.emulated for run in fp8)
    return ": FP8 ran emulated" if emulated else ": FP8 ran in hardware, and none of its steps were timed beside BF16's"


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
        said.append(f"{who} trains faster than BF16 {where(ours)}{times(ours)}")
    if stock:
        does = "" if ours else " trains faster than BF16"
        said.append(f"stock torchao{does} {where(stock)}{times(stock)}, by `{stock.recipe}`")
    said += [f"`{payoff.recipe}` {where(payoff)}" for payoff in never]
    contexts = [f"{context:,}" for context in sorted({one for payoff in recipes for one in payoff.contexts})]
    return f"On {short_device(recipes[0].device)}, in contexts of {listing(contexts)} tokens, {'; '.join(said)}."


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
    places = [f"{device} ({listing(unique(own))} parameters)" for device, own in sorted(sizes.items())]
    what = "Losses and scores" if any(run.evaluation is not None for run in runs) else "Losses"
    seconds = [run.record.speed.wall_seconds for run in runs if run.record.speed]
    longest = f"; no run took longer than {max(seconds) / 60:.1f} minutes" if seconds else ""
    text = f"{what} were measured here on {listing(places)}{longest}."
    return f"{scale_note(evidence.runs)} {text}" if evidence.runs.toy else text
