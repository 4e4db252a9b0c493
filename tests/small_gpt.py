"""A small random GPT with a tokenizer of its own, for what happens after training."""

from __future__ import annotations

import functools
import random

import tiktoken
import torch

from fp8lab import tokenizer
from fp8lab.config import ModelConfig
from fp8lab.model import GPT

TEXT = [
    "The largest value of each row is its scale; it's rounded, then they've multiplied 1024 by 16.\n",
    "def softmax(x):\n    return np.exp(x) / np.exp(x).sum(axis=-1)\n\n\n",
    "  Überraschung: naïve café, 100 €, 東京, Δx → 0  \t#include <stdio.h>\r\n",
]
CONFIG = ModelConfig(name="small", d_model=64, n_layers=3, n_heads=2, d_ff=96, vocab_size=368, seq_len=128)


@functools.cache
def make_encoding() -> tiktoken.Encoding:
    """A BPE of 352 entries trained on `TEXT`; 16 fewer than the model's rows, as with a padded vocabulary."""
    rng = random.Random(1)
    return tokenizer.train(["".join(rng.choice(TEXT) for _ in range(4)) for _ in range(50)], 352, "small")


@functools.cache
def make_model() -> GPT:
    """Random weights, far from their initialisation, so that a weight in the wrong place is seen."""
    model = GPT(CONFIG)
    model.initialise(seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
            else:
                parameter.mul_(2)
    return model.eval()
