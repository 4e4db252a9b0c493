"""Where a recipe pays, in words."""

from __future__ import annotations

import pandas as pd

from fp8lab.analysis.decision import Payoff
from fp8lab.units import listing, span


def where(payoff: Payoff) -> str:
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


def widths_by_tokens(cells: pd.DataFrame) -> str:
    """Cells of the speed map in words: 'at 8,192 tokens a micro-batch width 256 and 512, at 65,536 width 256'."""
    said: list[str] = []
    for tokens, own in cells.groupby("tokens"):
        unit = "" if said else " tokens a micro-batch"
        said.append(f"at {tokens:,}{unit} width {listing([f'{width:,}' for width in sorted(set(own['width']))])}")
    return ", ".join(said)


def times(payoff: Payoff) -> str:
    """How many times BF16's tokens/s, over the settings timed: to follow `where`."""
    return f", {span((payoff.slowest, payoff.fastest), 2)} times its tokens/s"
