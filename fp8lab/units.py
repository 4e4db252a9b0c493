"""Numbers and lists as the article writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def number(value: float) -> str:
    """A count with the suffix that suits it: 1.2M, 350M, 30B."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """A large count as 4.3e15."""
    return f"{value:.2e}".replace("e+", "e")


def signed(value: float, digits: int = 4) -> str:
    """A difference with its sign, a true minus included: +0.0054, −1.334."""
    return f"{value:+.{digits}f}".replace("-", "−")


def signed_percent(share: float, digits: int = 1) -> str:
    """A relative difference with its sign: +0.57%, −6.5%."""
    return f"{share:+.{digits}%}".replace("-", "−")


def span(values: Iterable[float], digits: int) -> str:
    """From the lowest to the highest, true minus included: 0.43 to 1.20; one number where both read alike."""
    ordered = sorted(values)
    low, high = (f"{value:.{digits}f}".replace("-", "−") for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"


def small_percent(share: float) -> str:
    """A share that may be tiny, as a percentage with two digits that count: 38%, 0.4%, 0.000042%; 0 for none."""
    return "0" if share == 0 else f"{np.format_float_positional(100 * share, 2, fractional=False, trim='-')}%"


def p_value(value: float) -> str:
    """A probability as statistics are reported: 0.034, <0.001."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def ranges(numbers: Iterable[int]) -> str:
    """'0-3, 5' of 0, 1, 2, 3 and 5, in any order; empty for none."""
    spans: list[list[int]] = []
    for value in sorted(set(numbers)):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def listing(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def unique(values: Iterable[str]) -> list[str]:
    """Values in order of first appearance, each once."""
    return list(dict.fromkeys(values))
