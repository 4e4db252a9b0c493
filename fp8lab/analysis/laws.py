"""Forms of scaling laws: the final loss of a training by size and tokens, and the constants that others published.

Kaplan's power law of one quantity (2001.08361, eqs. 1.1 and 1.2)::

    L(N) = (N_c / N) ** alpha

and Chinchilla's of size and tokens (Hoffmann et al., 2203.15556, approach 3)::

    L(N, D) = E + A / N ** alpha + B / D ** beta

What FP8 costs is one number more. All precisions share one law, and a run in FP8 counts as a BF16 run on a share m of
its tokens, L(N, m D), or of its parameters, L(m N, D). A loss gap grows or shrinks with size by itself; if m does not
depend on size, FP8 costs the same share of a budget everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Budget = Literal["tokens", "parameters"]
"""What an FP8 run makes less of."""


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = (scale / x) ** exponent: no irreducible loss."""

    scale: float
    exponent: float

    def __call__(self, x: ArrayLike) -> Floats:
        return (self.scale / np.asarray(x, dtype=float)) ** self.exponent


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N ** alpha + B / D ** beta, in nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def tokens_to_reach(self, parameters: float, loss: float) -> float:
        """Tokens that a model of this size needs for this loss; infinite where it cannot reach it."""
        left = loss - self.E - self.A / parameters**self.alpha
        return float((self.B / left) ** (1 / self.beta)) if left > 0 else float("inf")

    @property
    def size_exponent(self) -> float:
        """a of N ~ C ** a for the size that makes the most of a compute C = 6 N D (2203.15556, eq. 4)."""
        return self.beta / (self.alpha + self.beta)


CONSTANTS = len(fields(Chinchilla))
"""Of Chinchilla's law."""


@dataclass(frozen=True)
class Kaplan:
    """L(N, D) = ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D, N without embeddings (2001.08361, eq. 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float

    def __call__(self, non_embedding: ArrayLike, tokens: ArrayLike) -> Floats:
        n, d = np.asarray(non_embedding, dtype=float), np.asarray(tokens, dtype=float)
        return ((self.N_c / n) ** (self.alpha_N / self.alpha_D) + self.D_c / d) ** self.alpha_D


KAPLAN = Kaplan(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
"""The constants of 2001.08361, table 2."""
HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""The constants of 2203.15556."""
BESIROGLU = Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""The same data fitted again (2404.10102)."""

PUBLISHED: dict[str, Kaplan | Chinchilla] = {
    "Kaplan et al.": KAPLAN,
    "Hoffmann et al.": HOFFMANN,
    "Besiroglu et al.": BESIROGLU,
}
"""Laws of other data and tokenizers: their differences between sizes may be compared with ours, not their losses."""


def published_loss(name: str, parameters: ArrayLike, non_embedding: ArrayLike, tokens: ArrayLike) -> Floats:
    """Loss by one of the `PUBLISHED` laws, each in its own convention of N."""
    law = PUBLISHED[name]
    return law(non_embedding if isinstance(law, Kaplan) else parameters, tokens)


@dataclass(frozen=True)
class JointLaw:
    """One law for all precisions: a run in FP8 is a BF16 run on a share of its tokens or of its parameters."""

    bf16: Chinchilla
    multipliers: dict[str, float]
    """The share by FP8 recipe; below 1 where FP8 costs something."""
    on: Budget = "tokens"

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike, recipe: str = "bf16") -> Floats:
        share = self.multipliers.get(recipe, 1.0)
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.bf16(n * share, d) if self.on == "parameters" else self.bf16(n, d * share)

    def covers(self, recipe: str) -> bool:
        """True if runs of `recipe` were among those that the law was fitted to."""
        return recipe == "bf16" or recipe in self.multipliers

    def of(self, points: pd.DataFrame) -> Floats:
        """The law's loss at each row of `points`."""
        rows = zip(points["parameters"], points["tokens"], points["recipe"], strict=True)
        return np.array([float(self(n, d, recipe)) for n, d, recipe in rows])
