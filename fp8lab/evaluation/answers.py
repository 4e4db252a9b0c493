"""What lm-eval's accuracies do not show: how likely the correct answers are, and what guessing would score.

A small model's accuracy stands at chance long after it has begun to find the right answers likelier, so the
bits it needs for their text move first. And an accuracy means nothing without its baselines: guessing among the
choices, and always giving the same letter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Sample = Mapping[str, Any]
"""One scored item as lm-eval logs it."""


def correct_answers(samples: Sequence[Sample]) -> dict[str, float | int]:
    """Bits that the text of the correct answers costs, given their questions.

    All bits over all bytes (and characters) of the answers as they were scored, the leading space included.
    The standard errors are those of a ratio of two sums over independent items (Cochran, Sampling Techniques,
    3rd ed., section 2.11).

    Returns:
        bits_per_byte, bits_per_byte_stderr, bits_per_character, bits_per_character_stderr, n.
    """
    bits, lengths = [], {"byte": [], "character": []}  # type: ignore[var-annotated]
    for sample in samples:
        index = _gold(sample)
        text = sample["arguments"][index][1]
        bits.append(-sample["filtered_resps"][index][0] / math.log(2))
        lengths["byte"].append(len(text.encode("utf-8")))
        lengths["character"].append(len(text))
    result: dict[str, float | int] = {"n": len(bits)}
    for unit, counts in lengths.items():
        ratio = sum(bits) / sum(counts)
        residuals = np.array(bits) - ratio * np.array(counts)
        result[f"bits_per_{unit}"] = ratio
        result[f"bits_per_{unit}_stderr"] = float(
            np.sqrt((residuals**2).sum() * len(bits) / max(len(bits) - 1, 1)) / sum(counts)
        )
    return result


def random_guess(samples: Sequence[Sample]) -> float:
    """Expected accuracy of choosing uniformly among each item's own choices."""
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def constant_guess(samples: Sequence[Sample]) -> float | None:
    """Accuracy of always giving the answer that is correct most often; None where each item has answers of its own."""
    if len({tuple(answer for _, answer in sample["arguments"]) for sample in samples}) > 1:
        return None
    (_, count), *_ = Counter(_gold(sample) for sample in samples).most_common(1)
    return count / len(samples)


def _gold(sample: Sample) -> int:
    """Index of the correct choice."""
    target = sample["target"]
    if isinstance(target, int):
        return target
    # Winogrande scores one ending after several beginnings: its target is that ending, and its answer names the place.
    return int(sample["doc"]["answer"]) - 1
