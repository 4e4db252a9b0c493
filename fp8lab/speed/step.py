"""The bare optimizer step that is timed."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fp8lab.cpu import bf16_autocast
from fp8lab.kernels import end_step
from fp8lab.loss import training_loss
from fp8lab.model import GPT

GRADIENT_CLIP = 1.0


def optimizer_step(model: GPT, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """The bare step: forward, backward, gradient norm, clipping, fused AdamW, and nothing that a trainer adds.

    Args:
        model: converted and compiled.
        optimizer: fused AdamW over its parameters.
        tokens: (micro_batch, seq_len + 1), on the device.

    Returns:
        The loss, on the device.
    """
    with bf16_autocast(tokens.device):
        objective, loss = training_loss(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])
    objective.backward()
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    norm = torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    )
    optimizer.grad_scale = (norm / GRADIENT_CLIP).clamp(min=1.0)  # type: ignore[attr-defined]
    skip = ~torch.isfinite(norm)
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    end_step(model, skip)
    return loss
