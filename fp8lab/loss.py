"""Next-token cross-entropy: for training, with its gradients; for validation, its sum alone.

Neither ever holds the FP32 logits of a whole batch, which at 50,304 entries would be the largest tensor
of a step by far: on a GPU a kernel reads them in BF16, a chunk of tokens at a time, and makes no FP32 copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lab.kernels import Fp8TiedHead, linear_cross_entropy
from fp8lab.kernels.head import CHUNK_LOGITS
from fp8lab.kernels.operations import operations
from fp8lab.model import GPT

CPU_CHUNK_LOGITS = 2**27
"""Logits held at once in validation on a CPU: 512 MiB in FP32. On a GPU as many as in training, in BF16."""


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
    on_cpu = hidden.device.type == "cpu"
    cross_entropy_alone = operations(emulate=on_cpu).cross_entropy_alone
    rows = max(1, (CPU_CHUNK_LOGITS if on_cpu else CHUNK_LOGITS) // len(model.embedding.weight))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for some_hidden, some_targets in zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True):
        total += cross_entropy_alone(model.logits(some_hidden), some_targets).sum(dtype=torch.float64)
    return total
