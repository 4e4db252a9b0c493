"""Tokens made by a seeded rule, behind the interface of `fp8lab.data`: learnable, instant, the same everywhere.

A byte follows a byte by a fixed permutation four times out of five, else it is uniform. The best possible loss
is the entropy of that choice, about 1.6 nats; a model that has learned nothing is at ln 256 = 5.5.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import tiktoken

from fp8lab.config import ModelConfig, RunConfig

BYTES = 256
VOCAB_SIZE = 272
"""256 bytes and end-of-text, padded to a multiple of 16."""


def tiny_model(**changes) -> ModelConfig:
    """A model that takes milliseconds a step."""
    fields = {"name": "tiny", "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "seq_len": 32}
    return ModelConfig(**fields | {"vocab_size": VOCAB_SIZE} | changes)


def tiny_config(**changes) -> RunConfig:
    """A run of 20 steps of 128 tokens."""
    fields = {
        "plan": "test",
        "run": "tiny",
        "model": tiny_model(),
        "recipe": "bf16",
        "seed": 1,
        "mixture": "rule",
        "tokens": 20 * 128,
        "global_batch_tokens": 128,
        "micro_batch": 4,
        "optimizer": {"peak_learning_rate": 1e-2},
        "compile": False,
        "validation_tokens": 128,
        "checkpoint_interval": 10,
    }
    return RunConfig(**fields | changes)


def sequences(seed: int, count: int, length: int) -> np.ndarray:
    """(count, length) int64 tokens by the rule."""
    follows = np.random.default_rng(0).permutation(BYTES)
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, BYTES, (count, length))
    by_rule = generator.random((count, length)) < 0.8
    for position in range(1, length):
        tokens[:, position] = np.where(by_rule[:, position], follows[tokens[:, position - 1]], tokens[:, position])
    return tokens


class RuleDataset:
    """`fp8lab.data.TokenDataset`, by the rule."""

    sha256 = hashlib.sha256(b"rule").hexdigest()
    tokenizer_sha256 = hashlib.sha256(b"bytes").hexdigest()

    def __init__(self) -> None:
        self.encoding = tiktoken.Encoding(
            name="bytes",
            pat_str=r"(?s).",
            mergeable_ranks={bytes([byte]): byte for byte in range(BYTES)},
            special_tokens={"<|endoftext|>": BYTES},
        )
        self.weights = {"odd": 0.75, "even": 0.25}
        self.train_tokens = {"odd": 1_000_000, "even": 1_000_000}

    def validation_windows(self, domain: str, seq_len: int, max_tokens: int) -> tuple[np.ndarray, int]:
        count = max(1, max_tokens // seq_len)
        return sequences(1_000_003 + len(domain), count, seq_len + 1), count * seq_len


class RuleLoader:
    """`fp8lab.data.Loader`, by the rule."""

    def __init__(self, config: RunConfig) -> None:
        self._seed = config.seed
        self._rows = config.global_batch_tokens // config.model.seq_len
        self._seq_len = config.model.seq_len

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        share = self._rows // world_size
        return sequences(self._seed * 100_000 + step, self._rows, self._seq_len + 1)[rank * share :][:share]

    def epochs(self, step: int) -> dict[str, float]:
        return {domain: step * self._rows * self._seq_len / 2_000_000 for domain in ("odd", "even")}


def open_data(config: RunConfig, data_dir: Path) -> tuple[RuleDataset, RuleLoader]:
    """Stands in for `fp8lab.training.trainer.open_data`."""
    return RuleDataset(), RuleLoader(config)
