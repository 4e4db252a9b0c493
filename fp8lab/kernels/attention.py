"""Causal attention in BF16, forward and backward by hand.

`torch.nn.functional.scaled_dot_product_attention` would keep q, k and v for its own backward. Calling the
operators behind it lets the block decide what is kept, and what is computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

aten = torch.ops.aten


class Saved(NamedTuple):
    """What backward needs besides q, k, v and the output."""

    backend: str
    logsumexp: Tensor
    rest: tuple[Any, ...]
    """The backend's own: sequence lengths and the state of the (unused) dropout."""


def _backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    if can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, False)):
        return "cudnn"
    return "flash"


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
    """Attention of q, k, v, each (batch, heads, seq, head_dim); returns the output in that shape, and what to save."""
    backend = _backend(q, k, v)
    if backend == "cpu":
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out, Saved(backend, logsumexp, ())
    if backend == "cudnn":
        out, logsumexp, *rest = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    else:
        out, logsumexp, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return out, Saved(backend, logsumexp, tuple(rest[:6]))


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (batch, heads, seq, head_dim)."""
    if saved.backend == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, saved.logsumexp, 0.0, True)
    lengths_q, lengths_k, longest_q, longest_k, seed, offset = saved.rest
    if saved.backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, saved.logsumexp, seed, offset, None,
            lengths_q, lengths_k, longest_q, longest_k, 0.0, True,
        )  # fmt: skip
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, saved.logsumexp, lengths_q, lengths_k, longest_q, longest_k, 0.0, True, seed, offset
    )
