"""What FP8 costs in loss and what its speed is worth at matched loss, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.analysis import decision, matched
from fp8lab.analysis.decision import Matched
from fp8lab.analysis.losses import MeasuredGap, left_out, telling
from fp8lab.analysis.starts import (
    FEWEST_SEEDS,
    Start,
    by_setting,
    change_between,
    changes_text,
    figure_label,
    flushed_text,
    gaps_text,
    pairs_with_defaults,
)
from fp8lab.analysis.timings import short_device
from fp8lab.claims import OURS
from fp8lab.config import MODELS
from fp8lab.frontpage.evidence import Evidence
from fp8lab.units import listing, span, unique


def loss_costs(evidence: Evidence) -> str:
    """What is known of the cost in loss, of each recipe at the sizes that have seeds and at its largest."""
    return f"{clear_costs(evidence)} {unclear_costs(evidence)}".strip()


def clear_costs(evidence: Evidence) -> str:
    """Of `loss_costs` what seeds leave no doubt about."""
    gaps = telling([row.measured for row in evidence.matched])
    said = []
    for raised, which in ((True, "higher"), (False, "lower")):
        clear = [one for one in gaps if _excludes_zero(one) and (one.gap.mean > 0) == raised]
        if clear:
            said.append(f"FP8 ends at a {which} loss, by 95% intervals that exclude zero: {_listed(clear)}.")
            said += _learning_rates(clear, evidence)
    return " ".join(said)


def _learning_rates(gaps: Sequence[MeasuredGap], evidence: Evidence) -> list[str]:
    """Sentences on those of `gaps` that were not trained at the ladder's learning rate, and on what they are at it."""
    elsewhere: dict[str, list[str]] = {}
    for measured in gaps:
        for like in evidence.ladder.where(size=measured.size, recipe="bf16")[:1]:
            ratio = f"{measured.baseline.learning_rate / like.learning_rate:.2g}"
            if ratio != "1":
                elsewhere.setdefault(ratio, []).append(f"{measured.named} at {measured.size}")
    told = elsewhere.items()
    said = [f"Trained at {ratio} times the ladder's learning rate: {listing(which)}." for ratio, which in told]
    keys = [(measured.size, measured.recipe) for measured in gaps]
    others = [other for other in evidence.tuned_as_ladder if (other.size, other.recipe) in keys]
    return said + ([f"At the ladder's rate FP8 − BF16 is {_listed(others)}."] if others else [])


def unclear_costs(evidence: Evidence) -> str:
    """The rest of it, and the runs that are in no gap."""
    gaps = telling([row.measured for row in evidence.matched])
    unclear = [measured for measured in gaps if not _excludes_zero(measured)]
    said = [f"Not shown to differ from zero: FP8 − BF16 is {_listed(unclear)}."] if unclear else []
    return " ".join([*said, *_learning_rates(unclear, evidence), left_out(gaps)]).strip()


def _excludes_zero(measured: MeasuredGap) -> bool:
    return measured.has_seeds and measured.gap.excludes_zero


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

    They are recommended only where several seeds agree on the sign, and no further than a start tells.
    """
    larger = _larger_starts(evidence)
    said = []
    for pairs in pairs_with_defaults(larger):
        ours = pairs[0].changed.ours
        if ours.changed_settings != "gradient_format: e5m2":
            continue
        flushed = flushed_text(pairs)
        said.append(
            f"In the first minutes of {ours.size} {changes_text(pairs)}{'; ' if flushed else ''}{flushed} "
            f"(@fig-{figure_label(ours.size)}). {_against_baseline([pair.changed for pair in pairs])}"
        )
        gap = change_between(pairs)
        if len(pairs) >= FEWEST_SEEDS and gap.excludes_zero and gap.mean < 0:
            said.append(
                f"As far as a start tells, train {ours.size} with E5M2 gradients; the log says which seeds raised the "
                "question and which answered it."
            )
        same = [start for start in larger if (start.size, start.recipe) == (ours.size, "tensorwise")]
        if all(pair.gap < 0 for pair in pairs) and same and all(start.gap > 0 for start in same):
            said.append(
                f"FP8 − BF16 is {gaps_text(same)}, whose gradients are in E5M2 too: the format alone does not explain "
                "how FP8 starts."
            )
    return " ".join(said)


def _against_baseline(seeds: Sequence[Start]) -> str:
    """A sentence on one setting beside BF16."""
    few = "; how far rounding alone moves a run is not known there" if len(seeds) < FEWEST_SEEDS else ""
    return f"FP8 − BF16 is then {gaps_text(seeds)}{few}."


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
