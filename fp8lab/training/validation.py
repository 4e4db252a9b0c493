"""Loss on held-out text: every domain's own windows, in BF16, whatever the recipe trains in.

It is the weights that are measured. A recipe that quantises them in training is not asked to in validation, so that
losses of two recipes differ by what they have learned alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fp8lab.config import RunConfig
from fp8lab.cpu import bf16_autocast
from fp8lab.data import TokenDataset
from fp8lab.loss import total_nats
from fp8lab.model import GPT
from fp8lab.records import DomainLoss
from fp8lab.training.compilation import compile_blocks
from fp8lab.training.distributed import World

VALIDATION_TYPES = {"step": "int64", "tokens": "int64", "domain": "str", "loss": "float64", "bits_per_byte": "float64"}


@torch.no_grad()
def validation_losses(
    model: GPT, dataset: TokenDataset, config: RunConfig, world: World, *, compiled: bool
) -> dict[str, DomainLoss]:
    """Losses of a plain `model` on each domain's validation text; all ranks ask together, and have the same.

    Args:
        model: on its device; left eager, since probes and samples need it so.
        dataset: whose validation windows.
        config: the run's: context, micro-batch and number of tokens.
        world: the ranks, which share the windows.
        compiled: run a compiled twin over the same weights.
    """
    device = model.embedding.weight.device
    if compiled:
        model = share_weights(model)
        compile_blocks(model, device)
    losses = {}
    for domain in dataset.weights:
        windows, text_bytes = dataset.validation_windows(domain, config.model.seq_len, config.validation_tokens)
        nats = torch.zeros((), dtype=torch.float64, device=device)
        own = torch.from_numpy(windows[world.rank :: world.size])
        for rows in own.split(config.micro_batch):
            rows = rows.to(device)
            with bf16_autocast(device):
                nats += total_nats(model, model.hidden(rows[:, :-1]), rows[:, 1:])
        world.sum(nats)
        predicted = windows.shape[0] * config.model.seq_len
        losses[domain] = DomainLoss(loss=float(nats) / predicted, bits_per_byte=float(nats) / math.log(2) / text_bytes)
    return losses


def share_weights(model: GPT, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """A plain model over the same weights, or over `weights` in their place; it wants no gradients of its own."""
    with torch.device("meta"):
        twin = GPT(model.config)
    twin.load_state_dict(model.state_dict() if weights is None else weights, assign=True)
    twin.cos, twin.sin = model.cos, model.sin
    return twin.eval().requires_grad_(False)
