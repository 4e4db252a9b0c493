"""What FP8 costs in loss and what its speed is worth at matched loss, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.analysis import decision, matched
from fp8lab.analysis.decision import Matched
from fp8lab.analysis.losses import MeasuredGap, left_out, most_seeds
from fp8lab.analysis.starts import Change, Start, by_setting, figure_label, gaps_text, pairs_with_defaults
from fp8lab.analysis.timings import short_device
from fp8lab.claims import OURS
from fp8lab.config import MODELS
from fp8lab.frontpage.evidence import Evidence
from fp8lab.units import listing, small_percent, span, unique


def loss_costs(evidence: Evidence) -> str:
    """What is known of the cost in loss, of each recipe at its size with most seeds."""
    return f"{clear_costs(evidence)} {unclear_costs(evidence)}".strip()


def clear_costs(evidence: Evidence) -> str:
    """Of `loss_costs` what seeds leave no doubt about."""
    telling = most_seeds([row.measured for row in evidence.matched])
    said = []
    for raised, which in ((True, "higher"), (False, "lower")):
        clear = [one for one in telling if _excludes_zero(one) and (one.gap.mean > 0) == raised]
        if clear:
            said.append(f"FP8 ends at a {which} loss, by 95% intervals that exclude zero: {_listed(clear)}.")
    return " ".join(said)


def unclear_costs(evidence: Evidence) -> str:
    """The rest of it, and the runs that are in no gap."""
    telling = most_seeds([row.measured for row in evidence.matched])
    if not telling:
        return ""
    unclear = [measured for measured in telling if not _excludes_zero(measured)]
    said = [f"What FP8 costs in loss these runs cannot tell from nothing: {_listed(unclear)}."] if unclear else []
    return " ".join([*said, left_out(telling)]).strip()


def _excludes_zero(measured: MeasuredGap) -> bool:
    return measured.gap.excludes_zero and not measured.assumed


def _listed(gaps: Sequence[MeasuredGap]) -> str:
    return listing([measured.text("nats/token") for measured in gaps])


def starts(evidence: Evidence) -> str:
    """What FP8 does to the first minutes of models larger than those trained to an end."""
    larger = _larger_starts(evidence)
    if not larger:
        return evidence.starts_left_out
    told = []
    for setting in by_setting(larger):
        factors = [start.token_factor for start in setting if start.token_factor]
        told.append(gaps_text(setting, "nats/token") + (f", {span(factors, 2)} × the tokens" if factors else ""))
    said = (
        "Of larger models only the first minutes were trained, which say nothing of their end (@tbl-starts). FP8 − "
        f"BF16 there, and the tokens to one training loss over BF16's: {'; '.join(told)}."
    )
    return f"{said} {evidence.starts_left_out}".strip()


def gradient_formats(evidence: Evidence) -> str:
    """What E5M2 gradients did to the starts of larger models, beside what speaks against their being all of it.

    Nothing is recommended: that takes more pairs than a start is worth.
    """
    larger = _larger_starts(evidence)
    said = []
    for pairs in pairs_with_defaults(larger):
        ours = pairs[0].changed.ours
        if ours.changed_settings != "gradient_format: e5m2":
            continue
        said.append(
            f"In the first minutes of {ours.size} {ours.named} ended {listing([pair.text for pair in pairs])}"
            f"{_flushed(pairs)} (@fig-{figure_label(ours.size)})."
        )
        below = [pair.changed for pair in pairs if pair.changed.gap < 0]
        if below:
            told = [f"{-start.gap:.3f} nats (seed {start.ours.record.seed})" for start in below]
            said.append(
                f"It ended below BF16, by {listing(told)}: how far rounding alone moves a run is not known there."
            )
        same = [start for start in larger if (start.size, start.recipe) == (ours.size, "tensorwise")]
        if all(pair.gap < 0 for pair in pairs) and same and all(start.gap > 0 for start in same):
            said.append(
                f"FP8 − BF16 is {gaps_text(same)}, whose gradients are in E5M2 too: the format alone does not explain "
                "how FP8 starts."
            )
    return " ".join(said)


def _flushed(pairs: Sequence[Change]) -> str:
    """A clause on the first pair that measured its gradients at the same tokens; else empty."""
    for pair in pairs:
        shares = pair.flushed
        if len(shares):
            changed, default = (small_percent(most) for most in shares.max())
            seed = pair.changed.ours.record.seed
            whose = f"seed {seed}, means of all Linears"
            return f", and flushed at most {changed} of its gradients to zero, those {default} ({whose})"
    return ""


def _larger_starts(evidence: Evidence) -> list[Start]:
    trained = {row.measured.size for row in evidence.matched}
    return [start for start in evidence.starts if start.size not in trained]


def speed_at_matched_loss(evidence: Evidence) -> str:
    """The speed-up that is left when FP8 trains to BF16's loss, ours before others; else what is known towards it."""
    known = [row for row in evidence.matched if row.speedup]
    if not known:
        return _affordable(evidence)
    best = max(known, key=_tells)
    assert best.speedup
    assert best.device
    return (
        f"At matched loss `{best.measured.recipe}` is {best.speedup.text()} times as fast as BF16 at "
        f"{best.measured.size} on {short_device(best.device)} (@tbl-matched{_reservation(best)})."
    )


def _tells(row: Matched) -> tuple[bool, bool, int]:
    """What makes one speed-up at matched loss say more than another."""
    has_interval = row.speedup is not None and row.speedup.interval is not None
    return has_interval, row.measured.recipe == OURS, row.measured.gap.seeds


def _reservation(row: Matched) -> str:
    """What the speed-up lacks: each of its parts that has no interval leaves it without one."""
    if row.speedup and row.speedup.interval:
        return "; one seed, its scatter assumed" if row.measured.assumed else ""
    lacking = []
    if row.measured.gap.interval is None:
        lacking.append("one seed")
    if row.ratio and row.ratio.interval is None:
        lacking.append("too few timed rounds")
    if row.slope and row.slope.interval is None:
        lacking.append(f"a slope by the {row.slope.source} alone")
    return f"; without an interval: {listing(lacking)}"


def _affordable(evidence: Evidence) -> str:
    """What loss the speed of the widest model would pay for, where a law reaches that far."""
    rows = evidence.timings[(evidence.timings["recipe"] == OURS) & (evidence.timings["head"] == "bf16")]
    rows = rows[rows["model"].isin(list(MODELS)) & (rows["verdict"] == "faster")] if len(rows) else rows
    if rows.empty:
        return ""
    widest = rows.sort_values(["width", "ratio"]).iloc[-1]
    said = f"{_why_untested(evidence.matched)}, so the speed-up at matched loss is untested"
    slope = decision.slope_untrained(widest["model"], evidence.laws)
    if slope is None:
        return f"{said}."
    nats = matched.affordable_gap(widest["interval_low"], slope.nats)
    return (
        f"{said}; by the {slope.source}, the lower end of the speed of `{OURS}` at {widest['model']} on "
        f"{short_device(widest['device'])} would pay for a loss up to {nats:.3f} nats higher."
    )


def _why_untested(rows: Sequence[Matched]) -> str:
    """What is missing from every one of `rows` for a speed-up at matched loss."""
    timed = unique(row.measured.size for row in rows if row.ratio)
    if timed:
        return f"At the end of a training the loss falls too little, or by an unknown amount, at {listing(timed)}"
    return "No size was both timed and trained in the same FP8 recipe"
