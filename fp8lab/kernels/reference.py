"""What each kernel computes, in plain PyTorch: the specification that the Triton kernels are tested against.

Signatures and results are those of `fp8lab.kernels.triton_ops`, so the same block runs on either. Rows are
tokens: a tensor (batch, seq, features) is a matrix (rows, features). A name ending in ``_t`` is a transposed
copy, (features, rows) in memory.

Quantising: multiply by the slot's scale, saturate finite values at the format's largest, and round to FP8, to
nearest even. Both copies of a tensor agree bit for bit. A NaN or an infinity becomes NaN, never a number:
E4M3 has no infinity, and a saturated one would hide a diverged run. The kernels hold rows in pairs: where they
write a transposed copy, rows are an even number, and so are the tokens of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8lab.kernels.scaling import QUANTISE, Slot


def _observe(value: Tensor, slot: Slot) -> None:
    finite = torch.where(torch.isfinite(value), value, 0).abs()
    slot.amax[0] = torch.maximum(slot.amax[0], finite.max())


def _round(value: Tensor, slot: Slot) -> Tensor:
    value = value.float()
    scaled = (value * slot.scale[QUANTISE]).clamp(-slot.limit, slot.limit)
    return torch.where(torch.isfinite(value), scaled, torch.nan).to(slot.dtype)


def _transposed(matrix: Tensor) -> Tensor:
    # FP8 has no strided copy on every backend: its bytes do.
    return matrix.view(torch.uint8).t().contiguous().view(matrix.dtype)


def quantise(x: Tensor, slot: Slot) -> Tensor:
    """FP8 of `x` (rows, columns); gathers its amax."""
    _observe(x.float(), slot)
    return _round(x, slot)


def quantise_transposed(x: Tensor, slot: Slot) -> Tensor:
    """FP8 of `x` (rows, columns) as (columns, rows), by the scale that `quantise` used; gathers no amax."""
    return _transposed(_round(x, slot))


def quantise_both(x: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """FP8 of `x` (rows, columns) in both layouts; gathers its amax."""
    quantised = quantise(x, slot)
    return quantised, _transposed(quantised)


def _norm(x: Tensor, rstd: Tensor, gain: Tensor) -> Tensor:
    return x.float() * rstd[:, None] * gain


def rms_norm(
    x: Tensor, branch: Tensor | None, gain: Tensor, epsilon: float, slot: Slot
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of ``x + branch`` into FP8; gathers the amax.

    Args:
        x: (rows, d) BF16.
        branch: (rows, d) BF16 or None.
        gain: (d,) FP32.

    Returns:
        The sum (rows, d) BF16 (`x` itself without a branch), 1 / rms (rows,) FP32, and the normed sum (rows, d) FP8.
    """
    total = x if branch is None else (x.float() + branch.float()).to(x.dtype)
    rstd = torch.rsqrt(total.float().square().mean(-1) + epsilon)
    return total, rstd, quantise(_norm(total, rstd, gain), slot)


def rms_norm_backward(
    grad_normed: Tensor,
    x: Tensor,
    rstd: Tensor,
    gain: Tensor,
    dot: Tensor,
    grad_residual: Tensor,
    slot: Slot,
    grad_slot: Slot | None,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradient through RMSNorm, plus the residual stream's own; and what the GEMMs on either side of it want.

    RMSNorm's gradient needs the sum over a row of ``grad_normed * normed``. The Linear that reads the normed tensor
    has the same sum over its output: normed . (W^T grad_output) = (W normed) . grad_output. The kernel that makes
    that output's gradient has both in hand, so `dot` comes from there, and this one needs no whole rows.

    Args:
        grad_normed, x, grad_residual: (rows, d) BF16.
        rstd: (rows,) FP32.
        gain: (d,) FP32.
        dot: (rows,) FP32, each row's sum of output times grad_output of the Linear that reads the normed tensor.
        slot: the normed tensor's.
        grad_slot: the slot by which the Linear below quantises the gradient of x, whose amax is gathered; None if
            there is none.
        transposed: quantise that gradient in both layouts.

    Returns:
        Gradient of x (rows, d) BF16, and of gain (d,) FP32; the normed tensor of `rms_norm` again in FP8 (d, rows);
        the gradient of x in FP8, (rows, d) and (d, rows), or None.
    """
    grad = grad_normed.float()
    unit = x.float() * rstd[:, None]
    mean = dot[:, None] / x.shape[1]
    grad_x = ((grad * gain - unit * mean) * rstd[:, None] + grad_residual.float()).to(x.dtype)
    normed_t = quantise_transposed(_norm(x, rstd, gain), slot)
    quantised = None if grad_slot is None else quantise(grad_x, grad_slot)
    quantised_t = None if quantised is None or not transposed else _transposed(quantised)
    return grad_x, (grad * unit).sum(0), normed_t, quantised, quantised_t


def swiglu(gate_up: Tensor, slot: Slot) -> Tensor:
    """silu(gate) * up of (rows, 2 d_ff) BF16 into (rows, d_ff) FP8; gathers the amax."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantise(F.silu(gate) * up, slot)


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, slot: Slot, grad_slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of `swiglu`, with the transposed activation that down's weight gradient needs.

    Args:
        gate_up: (rows, 2 d_ff) BF16.
        grad: (rows, d_ff) BF16, gradient of the activation.
        slot: the activation's; `grad_slot`: the gradient's, whose amax is gathered.

    Returns:
        Gradient of gate_up in FP8 (rows, 2 d_ff) and (2 d_ff, rows), the activation in FP8 (d_ff, rows), and each
        row's sum of gate_up times its gradient (rows,) FP32, for `rms_norm_backward`.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    grad = grad.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    grad_up = grad * silu
    grad_gate_up, grad_gate_up_t = quantise_both(torch.cat((grad_gate, grad_up), dim=-1), grad_slot)
    dot = (grad_gate * gate + grad_up * up).sum(-1)
    return grad_gate_up, grad_gate_up_t, quantise_transposed(silu * up, slot), dot


def _heads(qkv: Tensor, n_heads: int) -> Tensor:
    """(rows, 3 d) as (rows, 3, heads, head_dim)."""
    return qkv.unflatten(-1, (3, n_heads, -1))


def _angles(angle: Tensor, rows: int) -> Tensor:
    """(seq, head_dim / 2) for each of `rows` rows of whole sequences, broadcast over heads."""
    return angle.repeat(rows // len(angle), 1)[:, None, :]


def norm_rotate(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, n_heads: int, epsilon: float
) -> Tensor:
    """QK-norm and RoPE.

    Args:
        qkv: (rows, 3 d) BF16, rows whole sequences.
        q_gain, k_gain: (head_dim,) FP32.
        cos, sin: (seq, head_dim / 2) FP32.

    Returns:
        (rows, 2, heads, head_dim) BF16: q and k.
    """
    rotated = []
    for x, gain in zip(_heads(qkv, n_heads).float().unbind(1)[:2], (q_gain, k_gain), strict=True):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain
        first, second = normed.chunk(2, dim=-1)
        c, s = _angles(cos, len(x)), _angles(sin, len(x))
        rotated.append(torch.cat((first * c - second * s, second * c + first * s), dim=-1))
    return torch.stack(rotated, dim=1).to(qkv.dtype)


def norm_rotate_backward(
    qkv: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    epsilon: float,
    slot: Slot,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of `norm_rotate`, with v's gradient, into FP8; gathers the amax.

    Args:
        qkv: (rows, 3 d) BF16.
        grads: gradients of q, k, v, each (batch, heads, seq, head_dim) BF16 with any strides.

    Returns:
        Gradient of qkv in FP8 (rows, 3 d) and (3 d, rows), and of the two gains (head_dim,) FP32; and each row's sum
        of qkv times its gradient (rows,) FP32, for `rms_norm_backward`.
    """
    rows, n_heads = len(qkv), grads[0].shape[1]
    c, s = _angles(cos, rows), _angles(sin, rows)
    parts, gain_grads = [], []
    for x, grad, gain in zip(_heads(qkv, n_heads).float().unbind(1)[:2], grads[:2], (q_gain, k_gain), strict=True):
        first, second = grad.transpose(1, 2).flatten(0, 1).float().chunk(2, dim=-1)
        grad_normed = torch.cat((first * c + second * s, second * c - first * s), dim=-1)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        unit, scaled = x * rstd, grad_normed * gain
        parts.append((scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * rstd)
        gain_grads.append((grad_normed * unit).sum((0, 1)))
    parts.append(grads[2].transpose(1, 2).flatten(0, 1).float())
    grad_qkv = torch.stack(parts, dim=1).flatten(1)
    quantised, quantised_t = quantise_both(grad_qkv, slot)
    return quantised, quantised_t, gain_grads[0], gain_grads[1], (grad_qkv * qkv.float()).sum(-1)


def matmul(a: Tensor, b: Tensor, a_slot: Slot, b_slot: Slot, dtype: torch.dtype, fast: bool) -> Tensor:
    """``a @ b.T`` of FP8 matrices (m, k) and (n, k), each divided by its scale.

    Accumulated in FP32. Where `fast`, tensor cores keep fewer bits (see `fp8lab.kernels`).
    """
    product = a.float() @ b.float().t()
    return (product * (a_slot.dequantise * b_slot.dequantise)).to(dtype)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row, and the gradient of the objective's sum over rows.

    Args:
        logits: (rows, vocab) BF16.
        targets: (rows,) int64.
        z_loss: coefficient of logsumexp(logits)^2 in the objective.

    Returns:
        Cross-entropy and logsumexp (rows,) FP32, and the logits' gradient (rows, vocab) in the logits' dtype.
    """
    values = logits.float()
    lse = values.logsumexp(-1)
    entropy = lse - values.gather(-1, targets[:, None]).squeeze(-1)
    return entropy, lse, _logits_gradient(values, targets, lse, z_loss).to(logits.dtype)


def cross_entropy_alone(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (rows,) FP32 of logits (rows, vocab) and targets (rows,), for validation: without a gradient."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _logits_gradient(values: Tensor, targets: Tensor, lse: Tensor, z_loss: float) -> Tensor:
    grad = torch.exp(values - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
    return grad.scatter_add(-1, targets[:, None], torch.full_like(grad[:, :1], -1.0))


def cross_entropy_quantised(
    logits: Tensor, targets: Tensor, z_loss: float, slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cross_entropy`, with the gradient in FP8 in both layouts: (rows, vocab) and (vocab, rows)."""
    values = logits.float()
    lse = values.logsumexp(-1)
    entropy = lse - values.gather(-1, targets[:, None]).squeeze(-1)
    grad = _round(_logits_gradient(values, targets, lse, z_loss), slot)
    return entropy, lse, grad, _transposed(grad)
