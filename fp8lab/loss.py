"""Next-token cross-entropy without the logits of the whole batch.

With 50,304 entries, the FP32 logits of 32 x 1,024 tokens take 6.6 GB, and their gradient as much
again. So the head and the loss run over a chunk of tokens at a time, and each chunk's gradient is
taken at once, while its logits exist: backward finds the gradients ready, and nothing is computed
twice. The gradient of the head's weight is summed over chunks in FP32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.model import GPT

CHUNK_LOGITS = 2**27
"""Logits held at once: 512 MiB in FP32."""


def next_token_loss(model: GPT, hidden: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of `targets` under the head of `model`.

    Args:
        model: owner of the head and its weight.
        hidden: (batch, seq, d_model) final normed activations.
        targets: (batch, seq) token ids.
        z_loss: coefficient of mean(logsumexp(logits)^2) in the objective (PaLM, 2204.02311, section 5).

    Returns:
        The objective to differentiate, and the cross-entropy alone, detached: FP32 scalars in nats a token.
    """
    return _ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1), model.embedding.weight, targets.flatten(), model.head, z_loss
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: nn.Module, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        wants_gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        tokens = len(targets)
        rows = max(1, CHUNK_LOGITS // len(weight))
        objective = hidden.new_zeros((), dtype=torch.float32)
        cross_entropy = torch.zeros_like(objective)
        if wants_gradients:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight)
        for start in range(0, tokens, rows):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(wants_gradients):
                chunk_hidden = hidden[chunk].detach().requires_grad_(wants_gradients)
                chunk_weight = weight.detach().requires_grad_(wants_gradients)
                logits = head(chunk_hidden, chunk_weight).float()
                chunk_entropy = F.cross_entropy(logits, targets[chunk], reduction="sum") / tokens
                chunk_objective = chunk_entropy
                if z_loss:
                    chunk_objective = chunk_entropy + z_loss * logits.logsumexp(-1).square().sum() / tokens
            if wants_gradients:
                grads = torch.autograd.grad(chunk_objective, (chunk_hidden, chunk_weight))
                grad_hidden[chunk] = grads[0]
                grad_weight += grads[1]
            objective += chunk_objective.detach()
            cross_entropy += chunk_entropy.detach()
        if wants_gradients:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_objective.to(grad_hidden.dtype), grad_weight * grad_objective, None, None, None
