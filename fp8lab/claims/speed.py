"""The claim that FP8 trains 40% faster at 1.5B."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from fp8lab.analysis.rounds import DRIFT, MIN_OCCASIONS, side
from fp8lab.analysis.timings import device_label, short_device
from fp8lab.claims.finding import Finding, Verdict
from fp8lab.units import listing, unique

CLAIMED_RATIO = 1.40
"""Tokens a second of FP8 over BF16, at 1.5B."""
CLAIMED_SIZE = "1.5B"
STOCK_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""torchao's, as it ships them: what the report used."""
FAST_VARIANT = "tensorwise_fast"
"""torchao's `tensorwise` with fast accumulation in all three GEMMs, which is not how it ships."""
OURS = "fused"


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
        lacks = "one occasion" if count else "too few rounds for an interval"
        why += f", {count} occasions in all." if count >= MIN_OCCASIONS else f", not confirmed yet: {lacks}."
    return Finding(
        claim=f"torchao's FP8 trains 40% faster at {CLAIMED_SIZE}.",
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
    if 0 < row["occasions"] < MIN_OCCASIONS:
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
    left_out = f"; {row['left_out']} rounds of a shorter occasion left out" if row["left_out"] else ""
    return f"{row['ratio']:.2f} ({row['interval_low']:.2f} to {row['interval_high']:.2f}{left_out})"
