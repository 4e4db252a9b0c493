"""Count models that a trained one must beat: unigram, and bigram interpolated with it (Jelinek & Mercer, 1980)."""

from __future__ import annotations

import numpy as np

LAMBDAS = np.linspace(0.02, 0.98, 49)


class CountModel:
    """Unigram and bigram counts of training windows."""

    def __init__(self, windows: np.ndarray, vocab_size: int) -> None:
        """
        Args:
            windows: (rows, length) token ids; pairs are counted within rows.
            vocab_size: tokens that may occur.
        """
        first, second = windows[:, :-1].ravel(), windows[:, 1:].ravel()
        # One added count a token, so that a token never seen has a probability.
        counts = np.bincount(second, minlength=vocab_size) + 1
        self._unigram = counts / counts.sum()
        self._pairs = np.zeros((vocab_size, vocab_size), dtype=np.float32)
        np.add.at(self._pairs, (first, second), 1)
        self._contexts = self._pairs.sum(1)

    def unigram_loss(self, windows: np.ndarray) -> float:
        """Mean nats a token of every token but each row's first."""
        return float(-np.log(self._unigram[windows[:, 1:]]).mean())

    def bigram_loss(self, windows: np.ndarray) -> float:
        """Mean nats a token, at the interpolation weight that suits `windows` best: a tuned opponent."""
        first, second = windows[:, :-1].ravel(), windows[:, 1:].ravel()
        unigram = self._unigram[second]
        seen = self._contexts[first] > 0
        bigram = np.where(seen, self._pairs[first, second] / np.maximum(self._contexts[first], 1), 0)
        losses = []
        for weight in LAMBDAS:
            interpolated = np.where(seen, weight * bigram + (1 - weight) * unigram, unigram)
            losses.append(-np.log(interpolated).mean())
        return float(min(losses))
