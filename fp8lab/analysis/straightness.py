"""Is a loss a straight line in the logarithm of size, as far as runs can tell?

The noise of a final loss is itself estimated, from runs of one size that differ in seed alone, and both questions take
that into account:

- Do the sizes scatter about the line by more than seeds do? The F test for lack of fit, of the sizes' means about the
  line against the scatter within sizes (Draper and Smith, section 2.1).
- Is the line known to be straight? A test that finds no bend says little where noise would hide one. So the bend is
  estimated: by how much the exponent changes from the smallest size to the largest, relative to the exponent, with its
  interval. An irreducible loss bends a power law: 1.5 nats of about 3 change the exponent by a fifth from 7M to 48M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fp8lab.analysis.comparison import Deviation, student_quantile


@dataclass(frozen=True)
class Straightness:
    """What runs say of a line through their sizes."""

    lack_of_fit_p: float
    """How likely seeds alone scatter the sizes about a line at least as much."""
    bend: float
    """Change of the exponent from the smallest size to the largest, over the exponent."""
    bend_interval: tuple[float, float]
    """95%."""


def straightness(parameters: Sequence[float], losses: Sequence[float], noise: Deviation) -> Straightness:
    """Of final losses against size, one entry a run.

    Args:
        parameters: at least three different sizes.
        losses: nats a token.
        noise: standard deviation of the logarithm of a loss between seeds (`log_noise`), the same at all sizes.
    """
    sizes = sorted(set(parameters))
    x = np.log(sizes)
    x = x - x.mean()
    groups = [np.log([loss for n, loss in zip(parameters, losses, strict=True) if n == size]) for size in sizes]
    means, weights = np.array([group.mean() for group in groups]), np.sqrt([len(group) for group in groups])
    line = np.polyfit(x, means, 1, w=weights)
    squares = float((((means - np.polyval(line, x)) * weights) ** 2).sum())
    free = len(sizes) - 2
    p = float(stats.f.sf(squares / free / noise.value**2, free, noise.degrees))
    design = np.vander(x, 3) * weights[:, None]
    curvature, _, _ = np.linalg.lstsq(design, means * weights, rcond=None)[0]
    error = noise.value * math.sqrt(np.linalg.inv(design.T @ design)[0, 0])
    reach = student_quantile(noise.degrees) * error
    # A parabola's slope changes by twice its curvature times the range.
    scale = 2 * (x[-1] - x[0]) / line[0]
    ends = sorted((scale * (curvature - reach), scale * (curvature + reach)))
    return Straightness(p, float(scale * curvature), (float(ends[0]), float(ends[1])))


def log_noise(groups: Sequence[Sequence[float]]) -> Deviation | None:
    """Scatter of the logarithm of losses within groups of runs alike but for their seed; None where none has two."""
    return Deviation.pooled([[math.log(loss) for loss in group] for group in groups])
