"""The output head and its loss, without FP32 logits.

Cross-entropy needs a row's logits twice: for the logsumexp, and for the gradient. With 50,304 entries the
logits are the largest tensor of a step, and a loss in separate operations reads and writes an FP32 copy
of them many times. Here the head's GEMM leaves them in BF16, one kernel reads them for the loss and
writes their gradient, and the gradient's two GEMMs run at once, for a chunk of tokens at a time: backward
finds its results ready.

With FP8, hidden states and weight are scaled by their own amax. The logits' gradient needs none: its
magnitude is at most 1 (softmax minus one-hot; a z-loss adds little), so its scale is a constant. It is
E5M2, because what matters spans from 1 down to a token's probability: E4M3 flushes one below 1e-6.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.config import FusedConfig
from fp8lab.kernels.operations import bf16_grad_weight, operations
from fp8lab.kernels.scaling import DEQUANTISE, DTYPES, QUANTISE, Slot, set_current_scale

CHUNK_LOGITS = 2**30
"""Logits held at once on a GPU: 2 GiB in BF16."""
EMULATED_CHUNK_LOGITS = 2**26
"""On a CPU, where the reference also makes FP32 copies."""
ROW_MULTIPLE = 128
LOGITS_GRADIENT_SCALE = 2.0**15
_CURRENT = FusedConfig(margin=0)


class Fp8TiedHead(nn.Module):
    """The tied head with its three GEMMs in FP8."""

    def __init__(self, *, emulate: bool) -> None:
        super().__init__()
        self.operations = operations(emulate)

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits (..., vocab_size) of `hidden` (..., d_model) and `weight` (vocab_size, d_model), in `hidden`'s dtype.

        For generation and evaluation: it has no gradient; training goes through `linear_cross_entropy`.
        """
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            hidden_slot, weight_slot = _slot(hidden), _slot(weight)
            rows = _current(self.operations.quantise, hidden.detach().flatten(0, -2).contiguous(), hidden_slot)
            quantised = _current(self.operations.quantise, weight.detach(), weight_slot)
            logits = self.operations.matmul(rows, quantised, hidden_slot, weight_slot, torch.bfloat16, fast=True)
        return logits.view(*hidden.shape[:-1], -1).to(hidden.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, fp8: bool, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of `targets` under the logits ``hidden @ weight.T``.

    Args:
        hidden: (tokens, d_model) BF16.
        weight: (vocab_size, d_model) FP32 or BF16.
        targets: (tokens,) token ids.
        fp8: run the three GEMMs in FP8; on a CPU, emulated.
        z_loss: coefficient of mean(logsumexp(logits)^2) in the objective (PaLM, 2204.02311, section 5).

    Returns:
        The objective to differentiate, and the cross-entropy alone, detached: FP32 scalars in nats a token.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, fp8, z_loss)


def _chunk_rows(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens a chunk: the chunks are of one size but for the last, and a multiple that FP8 GEMMs accept."""
    limit = EMULATED_CHUNK_LOGITS if device.type == "cpu" else CHUNK_LOGITS
    chunks = -(-tokens * vocabulary // limit)
    return -(-tokens // (chunks * ROW_MULTIPLE)) * ROW_MULTIPLE


def _slot(x: Tensor, dtype: torch.dtype = DTYPES["e4m3"]) -> Slot:
    return Slot(torch.ones(4, device=x.device), torch.zeros(4, device=x.device), dtype)


def _current(kernel: Any, x: Tensor, slot: Slot) -> Any:
    """Quantise `x` by its own amax."""
    # The amax alone, without a first quantised copy: this happens every step.
    slot.amax[0] = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    set_current_scale(slot, _CURRENT)
    return kernel(x, slot)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, fp8: bool, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        head = (_Fp8Head if fp8 else _Bf16Head)(
            operations(emulate=hidden.device.type == "cpu"), hidden.bfloat16(), weight
        )
        tokens = len(targets)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        entropies, lses = [], []
        for start in range(0, tokens, rows := _chunk_rows(tokens, len(weight), hidden.device)):
            chunk = slice(start, start + rows)
            entropy, lse, grad_hidden[chunk], chunk_grad_weight = head.chunk(chunk, targets[chunk], z_loss)
            grad_weight = chunk_grad_weight if grad_weight is None else grad_weight.add_(chunk_grad_weight)
            entropies.append(entropy)
            lses.append(lse)
        cross_entropy = torch.cat(entropies).mean()
        objective = cross_entropy.clone()
        if z_loss:
            objective = cross_entropy + z_loss * torch.cat(lses).square().mean()
        ctx.tokens = tokens
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad_objective / ctx.tokens
        # In place: the weight's gradient is the largest of the model. Autograd refuses a second backward through it.
        return grad_hidden.mul_(factor), grad_weight.mul_(factor), None, None, None


class _Bf16Head:
    def __init__(self, operations: ModuleType, hidden: Tensor, weight: Tensor) -> None:
        self._operations, self._hidden, self._weight = operations, hidden, weight.bfloat16()

    def chunk(self, chunk: slice, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cross-entropy and logsumexp of each row, and the gradients of their sum by hidden and by weight."""
        hidden = self._hidden[chunk]
        entropy, lse, grad = self._operations.cross_entropy(hidden @ self._weight.t(), targets, z_loss)
        return entropy, lse, grad @ self._weight, bf16_grad_weight(grad, hidden)


class _Fp8Head:
    def __init__(self, operations: ModuleType, hidden: Tensor, weight: Tensor) -> None:
        self._operations, self._source = operations, hidden
        self._hidden_slot, self._weight_slot = _slot(hidden), _slot(weight)
        self._grad_slot = _slot(hidden, DTYPES["e5m2"])
        self._grad_slot.scale[DEQUANTISE] = 1 / LOGITS_GRADIENT_SCALE
        self._grad_slot.scale[QUANTISE] = LOGITS_GRADIENT_SCALE
        self._weight, self._weight_t = _current(operations.quantise_both, weight, self._weight_slot)
        self._hidden = _current(operations.quantise, hidden, self._hidden_slot)

    def chunk(self, chunk: slice, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_Bf16Head.chunk`."""
        matmul, hidden_slot, weight_slot = self._operations.matmul, self._hidden_slot, self._weight_slot
        logits = matmul(self._hidden[chunk], self._weight, hidden_slot, weight_slot, torch.bfloat16, fast=True)
        entropy, lse, grad, grad_t = self._operations.cross_entropy_quantised(logits, targets, z_loss, self._grad_slot)
        del logits
        hidden_t = self._operations.quantise_transposed(self._source[chunk], hidden_slot)
        return (
            entropy,
            lse,
            matmul(grad, self._weight_t, self._grad_slot, weight_slot, torch.bfloat16, fast=False),
            matmul(grad_t, hidden_t, self._grad_slot, hidden_slot, torch.float32, fast=False),
        )
