"""The tokens that contestants are timed on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fp8lab.data import Loader, TokenDataset, load_mixture
from fp8lab.speed.plan import SpeedCase, SpeedPlan

DISTINCT_BATCHES = 4

Batches = Callable[[SpeedCase], list[Tensor]]


def batch_source(plan: SpeedPlan, data_dir: Path) -> tuple[Batches, str]:
    """A function from a case to its batches (micro_batch, seq_len + 1), and what the record calls their tokens."""
    datasets = {name: TokenDataset.open(load_mixture(name), data_dir) for name in plan.mixtures}
    if not datasets:
        return lambda case: _random_batches(case, plan.seed), "random ids"

    def from_data(case: SpeedCase) -> list[Tensor]:
        model, name = case.sized_model, case.mixture or plan.mixture
        if name is None or datasets[name].encoding.n_vocab > model.vocab_size:
            return _random_batches(case, plan.seed)
        loader = Loader(datasets[name], seq_len=model.seq_len, seed=plan.seed, global_batch_sequences=case.micro_batch)
        return [torch.from_numpy(loader.batch(step)) for step in range(DISTINCT_BATCHES)]

    used = ", ".join(f"{name} ({dataset.sha256[:12]})" for name, dataset in datasets.items())
    return from_data, f"mixture {used}; random ids where its vocabulary does not fit"


def _random_batches(case: SpeedCase, seed: int) -> list[Tensor]:
    model = case.sized_model
    generator = torch.Generator().manual_seed(seed)
    shape = (case.micro_batch, model.seq_len + 1)
    return [torch.randint(model.vocab_size, shape, generator=generator) for _ in range(DISTINCT_BATCHES)]
