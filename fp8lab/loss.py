"""Next-token cross-entropy: for training, with its gradients; for validation, its sum alone.

Neither ever holds the FP32 logits of a whole batch, which at 50,304 entries would be the largest tensor
of a step by far.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8lab.kernels import Fp8TiedHead, linear_cross_entropy
from fp8lab.model import GPT

VALIDATION_CHUNK_LOGITS = 2**27
"""Logits held at once in validation: 512 MiB in FP32."""


def training_loss(model: GPT, hidden: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy through the head of `model`, in the head's precision.

    Args:
        model: owner of the head and its weight.
        hidden: (batch, seq, d_model) final normed activations.
        targets: (batch, seq) token ids.
        z_loss: coefficient of mean(logsumexp(logits)^2) in the objective (PaLM, 2204.02311, section 5).

    Returns:
        The objective to differentiate, and the cross-entropy alone, detached: FP32 scalars in nats a token.
    """
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        model.embedding.weight,
        targets.flatten(),
        fp8=isinstance(model.head, Fp8TiedHead),
        z_loss=z_loss,
    )


@torch.no_grad()
def total_nats(model: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of `targets` (batch, seq) given `hidden` (batch, seq, d_model): an FP64 scalar, in nats."""
    rows = max(1, VALIDATION_CHUNK_LOGITS // len(model.embedding.weight))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for some_hidden, some_targets in zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True):
        total += F.cross_entropy(model.logits(some_hidden).float(), some_targets, reduction="sum")
    return total
