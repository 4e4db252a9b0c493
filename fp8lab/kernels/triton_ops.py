"""The Triton kernels; `fp8lab.kernels.reference` says what each computes.

All are limited by memory bandwidth, so each reads its inputs once where it can. Three shapes of kernel:

- *rows*: a program holds whole rows in registers and reduces along them (RMSNorm);
- *tiles*: a program holds a tile of rows x columns and writes it in one layout or both;
- *heads*: a tile of tokens of one attention head, whose dimension is reduced (QK-norm).

A tile that is stored transposed is exchanged between threads in BF16 and cast to FP8 afterwards (`_transposed`):
Triton 3.6 stores a wrong transposed copy if threads exchange FP8 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lab.kernels.scaling import Slot

# Kernels are no Python that a type checker could follow.
# mypy: allow-untyped-defs, allow-incomplete-defs


class Tile(NamedTuple):
    """What one program of a kernel holds."""

    rows: int
    columns: int
    warps: int


FLAT = Tile(4, 512, 4)
"""Kernels that write no transposed copy: long rows, for coalescing."""
SWIGLU = Tile(4, 512, 4)
TRANSPOSED = Tile(64, 128, 8)
"""Kernels that write a transposed copy alone."""
BOTH = Tile(128, 64, 8)
"""Kernels that write both layouts."""
NORM_BACKWARD = Tile(64, 64, 4)
SWIGLU_BACKWARD = Tile(64, 128, 8)
LOGITS_GRADIENT = Tile(64, 128, 8)
ROWS = Tile(4096, 0, 4)
"""Elements of whole rows that one program of a row kernel holds at most; columns are the tensor's own."""
HEADS = Tile(64, 0, 4)
"""Tokens of one attention head; columns are the head's own."""
HEADS_BACKWARD = Tile(64, 0, 4)
CROSS_ENTROPY = Tile(4, 4096, 16)
"""Entries of one row of logits at a time, as so many times so many. Few programs a processor: their rows fit in L2."""
CROSS_ENTROPY_SHORT = Tile(4, 2048, 8)
"""Rows that fit in L2 anyway."""
SHORT_VOCABULARY = 16_384
LOGSUMEXP = Tile(4, 1024, 4)

LOG2_E = tl.constexpr(1.4426950408889634)
"""The GPU's exponential is to base 2."""


@triton.jit
def _saturate(value, scale, limit):
    """Scaled, finite values saturated, the rest NaN; in BF16, from which every FP8 copy is cast."""
    # value - value is 0, or NaN where the value is not finite: clamps drop a NaN unless told to keep it.
    scaled = value * scale + (value - value)
    return tl.clamp(scaled, -limit, limit, propagate_nan=tl.PropagateNan.ALL).to(tl.bfloat16)


@triton.jit
def _transposed(value, out_ptr):
    """The transposed tile of a BF16 one, in the dtype of `out_ptr`."""
    # Through FP32, so that the compiler exchanges BF16 between threads: it moves the exchange before a widening.
    return tl.trans(value).to(tl.float32).to(out_ptr.dtype.element_ty)


@triton.jit
def _observe(amax_ptr, value):
    """Raise the amax to that of a tile's finite values."""
    magnitude = tl.abs(value)
    # The maximum drops NaN; an infinity is rare, and only then are the finite values picked out.
    amax = tl.max(magnitude)
    if amax == float("inf"):
        amax = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0))
    # Most tiles do not raise it: reading is cheaper than a contended atomic.
    tl.atomic_max(amax_ptr, amax, mask=amax > tl.load(amax_ptr))


@triton.jit
def _finite_magnitude(value):
    """Absolute values, 0 for what is not finite."""
    magnitude = tl.abs(value)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def _quantise_kernel(
    x_ptr, out_ptr, out_t_ptr, scale_ptr, amax_ptr, rows, columns, limit,
    OBSERVE: tl.constexpr, ROW_MAJOR: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if OBSERVE:
        _observe(amax_ptr, x)
    value = _saturate(x, tl.load(scale_ptr + 1), limit)
    if ROW_MAJOR:
        tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)
    if TRANSPOSED:
        mask_t = (column < columns)[:, None] & (row < rows)[None, :]
        tl.store(
            out_t_ptr + column[:, None] * rows + row[None, :],
            _transposed(value, out_t_ptr),
            mask=mask_t,
        )


def _grid(rows: int, columns: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)


def _quantise(x: Tensor, slot: Slot, *, observe: bool, row_major: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    out = torch.empty((rows, columns) if row_major else (0,), dtype=slot.dtype, device=x.device)
    out_t = torch.empty((columns, rows) if transposed else (0,), dtype=slot.dtype, device=x.device)
    tile = FLAT if not transposed else BOTH if row_major else TRANSPOSED
    _quantise_kernel[_grid(rows, columns, tile)](
        x, out, out_t, slot.scale, slot.amax, rows, columns, slot.limit,
        OBSERVE=observe, ROW_MAJOR=row_major, TRANSPOSED=transposed,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return out, out_t


def quantise(x: Tensor, slot: Slot) -> Tensor:
    return _quantise(x, slot, observe=True, row_major=True, transposed=False)[0]


def quantise_transposed(x: Tensor, slot: Slot) -> Tensor:
    return _quantise(x, slot, observe=False, row_major=False, transposed=True)[1]


def quantise_both(x: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    return _quantise(x, slot, observe=True, row_major=True, transposed=True)


@triton.jit
def _rms_norm_kernel(
    x_ptr, branch_ptr, gain_ptr, total_ptr, rstd_ptr, out_ptr, scale_ptr, amax_ptr, rows, d, epsilon, limit,
    HAS_BRANCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < d)[None, :]
    offset = row[:, None] * d + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        # Normalise what is stored: backward reads it again.
        total = x.to(tl.bfloat16)
        tl.store(total_ptr + offset, total, mask=mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / d + epsilon)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    gain = tl.load(gain_ptr + column, mask=column < d, other=0.0)
    normed = x * rstd[:, None] * gain[None, :]
    _observe(amax_ptr, normed)
    tl.store(out_ptr + offset, _saturate(normed, tl.load(scale_ptr + 1), limit).to(out_ptr.dtype.element_ty), mask=mask)


def _row_blocks(d: int) -> tuple[int, int]:
    """Rows and columns of a row kernel's program."""
    block = triton.next_power_of_2(d)
    return max(1, ROWS.rows // block), block


def rms_norm(
    x: Tensor, branch: Tensor | None, gain: Tensor, epsilon: float, slot: Slot
) -> tuple[Tensor, Tensor, Tensor]:
    rows, d = x.shape
    total = x if branch is None else torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    out = torch.empty(rows, d, dtype=slot.dtype, device=x.device)
    block_rows, block = _row_blocks(d)
    _rms_norm_kernel[(triton.cdiv(rows, block_rows),)](
        x, x if branch is None else branch, gain, total, rstd, out, slot.scale, slot.amax, rows, d, epsilon,
        slot.limit, HAS_BRANCH=branch is not None, BLOCK_ROWS=block_rows, BLOCK=block, num_warps=ROWS.warps,
    )  # fmt: skip
    return total, rstd, out


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, rstd_ptr, gain_ptr, dot_ptr, residual_ptr, grad_x_ptr, normed_t_ptr, out_ptr, out_t_ptr,
    partial_ptr, scale_ptr, grad_scale_ptr, amax_ptr, rows, d, limit, grad_limit,
    QUANTISE: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < rows
    in_columns = column < d
    mask = in_rows[:, None] & in_columns[None, :]
    mask_t = in_columns[:, None] & in_rows[None, :]
    offset = row[:, None] * d + column[None, :]
    offset_t = column[:, None] * rows + row[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
    mean = tl.load(dot_ptr + row, mask=in_rows, other=0.0) / d
    gain = tl.load(gain_ptr + column, mask=in_columns, other=0.0)
    unit = x * rstd[:, None]
    normed = _saturate(unit * gain[None, :], tl.load(scale_ptr + 1), limit)
    tl.store(normed_t_ptr + offset_t, _transposed(normed, normed_t_ptr), mask=mask_t)
    grad_gain = tl.sum(grad * unit, axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * d + column, grad_gain, mask=in_columns)
    grad_x = ((grad * gain[None, :] - unit * mean[:, None]) * rstd[:, None] + residual).to(tl.bfloat16)
    tl.store(grad_x_ptr + offset, grad_x, mask=mask)
    if QUANTISE:
        # What is stored, so that the copies are those of the BF16 gradient.
        stored = grad_x.to(tl.float32)
        _observe(amax_ptr, stored)
        value = _saturate(stored, tl.load(grad_scale_ptr + 1), grad_limit)
        tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)
        if TRANSPOSED:
            tl.store(out_t_ptr + offset_t, _transposed(value, out_t_ptr), mask=mask_t)


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
    rows, d = x.shape
    tile = NORM_BACKWARD
    grid = _grid(rows, d, tile)
    grad_x = torch.empty_like(x)
    normed_t = torch.empty(d, rows, dtype=slot.dtype, device=x.device)
    partial = torch.empty(grid[0], d, dtype=torch.float32, device=x.device)
    out = out_t = None
    if grad_slot is not None:
        out = torch.empty(rows, d, dtype=grad_slot.dtype, device=x.device)
        if transposed:
            out_t = torch.empty(d, rows, dtype=grad_slot.dtype, device=x.device)
    target = grad_slot or slot
    _rms_norm_backward_kernel[grid](
        grad_normed, x, rstd, gain, dot, grad_residual, grad_x, normed_t,
        normed_t if out is None else out, normed_t if out_t is None else out_t,
        partial, slot.scale, target.scale, target.amax, rows, d, slot.limit, target.limit,
        QUANTISE=out is not None, TRANSPOSED=out_t is not None,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return grad_x, partial.sum(0), normed_t, out, out_t


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, out_ptr, scale_ptr, amax_ptr, rows, d_ff, limit,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < d_ff)[None, :]
    pair = row[:, None] * (2 * d_ff) + column[None, :]
    gate = tl.load(gate_up_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + pair + d_ff, mask=mask, other=0.0).to(tl.float32)
    activated = gate * _sigmoid(gate) * up
    _observe(amax_ptr, activated)
    value = _saturate(activated, tl.load(scale_ptr + 1), limit)
    offset = row[:, None] * d_ff + column[None, :]
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up: Tensor, slot: Slot) -> Tensor:
    rows, d_ff = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, d_ff, dtype=slot.dtype, device=gate_up.device)
    _swiglu_kernel[_grid(rows, d_ff, SWIGLU)](
        gate_up, out, slot.scale, slot.amax, rows, d_ff, slot.limit,
        BLOCK_ROWS=SWIGLU.rows, BLOCK_COLUMNS=SWIGLU.columns, num_warps=SWIGLU.warps,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr, grad_ptr, out_ptr, out_t_ptr, activated_t_ptr, dot_ptr, grad_scale_ptr, amax_ptr, scale_ptr,
    rows, d_ff, grad_limit, limit, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < rows
    mask = in_rows[:, None] & (column < d_ff)[None, :]
    mask_t = (column < d_ff)[:, None] & in_rows[None, :]
    pair = row[:, None] * (2 * d_ff) + column[None, :]
    gate = tl.load(gate_up_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + pair + d_ff, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row[:, None] * d_ff + column[None, :], mask=mask, other=0.0).to(tl.float32)
    grad_scale = tl.load(grad_scale_ptr + 1)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    column_t = column[:, None] * rows + row[None, :]

    activated = _saturate(silu * up, tl.load(scale_ptr + 1), limit)
    tl.store(activated_t_ptr + column_t, _transposed(activated, activated_t_ptr), mask=mask_t)

    grad_up = grad * silu
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    dot = tl.sum(grad_gate * gate + grad_up * up, axis=1)
    tl.store(dot_ptr + row * tl.num_programs(1) + tl.program_id(1), dot, mask=in_rows)
    _observe(amax_ptr, tl.maximum(_finite_magnitude(grad_gate), _finite_magnitude(grad_up)))
    value = _saturate(grad_gate, grad_scale, grad_limit)
    tl.store(out_ptr + pair, value.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_t_ptr + column_t, _transposed(value, out_t_ptr), mask=mask_t)
    value = _saturate(grad_up, grad_scale, grad_limit)
    tl.store(out_ptr + pair + d_ff, value.to(out_ptr.dtype.element_ty), mask=mask)
    up_t = column_t + tl.cast(d_ff, tl.int64) * rows
    tl.store(out_t_ptr + up_t, _transposed(value, out_t_ptr), mask=mask_t)


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, slot: Slot, grad_slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, d_ff = grad.shape
    tile = SWIGLU_BACKWARD
    grid = _grid(rows, d_ff, tile)
    out = torch.empty(rows, 2 * d_ff, dtype=grad_slot.dtype, device=grad.device)
    out_t = torch.empty(2 * d_ff, rows, dtype=grad_slot.dtype, device=grad.device)
    activated_t = torch.empty(d_ff, rows, dtype=slot.dtype, device=grad.device)
    dot = torch.empty(rows, grid[1], dtype=torch.float32, device=grad.device)
    _swiglu_backward_kernel[grid](
        gate_up, grad, out, out_t, activated_t, dot, grad_slot.scale, grad_slot.amax, slot.scale, rows, d_ff,
        grad_slot.limit, slot.limit, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return out, out_t, activated_t, dot.sum(1)


@triton.jit
def _tokens(seq, BLOCK_TOKENS: tl.constexpr):
    """Sequence of this program and its tokens in it: a block lies within one, or each row would cost a division."""
    blocks = tl.cdiv(seq, BLOCK_TOKENS)
    sequence = tl.program_id(0) // blocks
    token = (tl.program_id(0) - sequence * blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    return sequence.to(tl.int64), token.to(tl.int64)


@triton.jit
def _norm_rotate_kernel(
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, out_ptr, seq, n_heads, epsilon,
    HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, token = _tokens(seq, BLOCK_TOKENS)
    row = sequence * seq + token
    head = tl.program_id(1)  # q's heads, then k's
    lane = tl.arange(0, BLOCK)
    in_half = lane < HALF
    mask = (token < seq)[:, None] & in_half[None, :]
    source = row[:, None] * (3 * n_heads * 2 * HALF) + head * 2 * HALF + lane[None, :]
    first = tl.load(qkv_ptr + source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + source + HALF, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(first * first + second * second, axis=1)
    rstd = tl.rsqrt(square / (2 * HALF) + epsilon)[:, None]
    gain_ptr = q_gain_ptr
    if head >= n_heads:
        gain_ptr = k_gain_ptr
    first = first * rstd * tl.load(gain_ptr + lane, mask=in_half, other=0.0)[None, :]
    second = second * rstd * tl.load(gain_ptr + HALF + lane, mask=in_half, other=0.0)[None, :]
    angle = token[:, None] * HALF + lane[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    target = row[:, None] * (2 * n_heads * 2 * HALF) + head * 2 * HALF + lane[None, :]
    tl.store(out_ptr + target, (first * cos - second * sin).to(tl.bfloat16), mask=mask)
    tl.store(out_ptr + target + HALF, (second * cos + first * sin).to(tl.bfloat16), mask=mask)


def norm_rotate(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, n_heads: int, epsilon: float
) -> Tensor:
    rows, half = len(qkv), cos.shape[1]
    out = torch.empty(rows, 2, n_heads, 2 * half, dtype=qkv.dtype, device=qkv.device)
    seq = len(cos)
    _norm_rotate_kernel[(rows // seq * triton.cdiv(seq, HEADS.rows), 2 * n_heads)](
        qkv, q_gain, k_gain, cos, sin, out, seq, n_heads, epsilon,
        HALF=half, BLOCK_TOKENS=HEADS.rows, BLOCK=triton.next_power_of_2(half), num_warps=HEADS.warps,
    )  # fmt: skip
    return out


@triton.jit
def _norm_rotate_backward_kernel(
    qkv_ptr, grad_ptr, gain_ptr, cos_ptr, sin_ptr, out_ptr, out_t_ptr, partial_ptr, dot_ptr, scale_ptr, amax_ptr,
    rows, seq, n_heads, first_head, batch_stride, head_stride, token_stride, epsilon, limit,
    NORMED: tl.constexpr, HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, token = _tokens(seq, BLOCK_TOKENS)
    row = sequence * seq + token
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    in_half = lane < HALF
    in_rows = token < seq
    mask = in_rows[:, None] & in_half[None, :]
    source = sequence * batch_stride + token[:, None] * token_stride + head * head_stride + lane[None, :]
    first = tl.load(grad_ptr + source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(grad_ptr + source + HALF, mask=mask, other=0.0).to(tl.float32)
    column = (first_head + head) * 2 * HALF + lane
    target = row[:, None] * (3 * n_heads * 2 * HALF) + column[None, :]
    x_first = tl.load(qkv_ptr + target, mask=mask, other=0.0).to(tl.float32)
    x_second = tl.load(qkv_ptr + target + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        angle = token[:, None] * HALF + lane[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        square = tl.sum(x_first * x_first + x_second * x_second, axis=1)
        rstd = tl.rsqrt(square / (2 * HALF) + epsilon)
        x_first *= rstd[:, None]
        x_second *= rstd[:, None]
        grad_first = first * cos + second * sin
        grad_second = second * cos - first * sin
        partial = (tl.program_id(0).to(tl.int64) * n_heads + head) * 2 * HALF + lane
        tl.store(partial_ptr + partial, tl.sum(grad_first * x_first, axis=0), mask=in_half)
        tl.store(partial_ptr + partial + HALF, tl.sum(grad_second * x_second, axis=0), mask=in_half)
        first = grad_first * tl.load(gain_ptr + lane, mask=in_half, other=0.0)[None, :]
        second = grad_second * tl.load(gain_ptr + HALF + lane, mask=in_half, other=0.0)[None, :]
        mean = tl.sum(first * x_first + second * x_second, axis=1) / (2 * HALF)
        first = (first - x_first * mean[:, None]) * rstd[:, None]
        second = (second - x_second * mean[:, None]) * rstd[:, None]
        # A normed vector's gradient is orthogonal to it but for epsilon.
        dot = mean * (2 * HALF - square * rstd * rstd)
    else:
        dot = tl.sum(first * x_first + second * x_second, axis=1)
    tl.store(dot_ptr + row * (3 * n_heads) + first_head + head, dot, mask=in_rows)
    _observe(amax_ptr, tl.maximum(_finite_magnitude(first), _finite_magnitude(second)))
    scale = tl.load(scale_ptr + 1)
    first_value = _saturate(first, scale, limit)
    second_value = _saturate(second, scale, limit)
    tl.store(out_ptr + target, first_value.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + target + HALF, second_value.to(out_ptr.dtype.element_ty), mask=mask)
    mask_t = in_half[:, None] & in_rows[None, :]
    target_t = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_t_ptr + target_t, _transposed(first_value, out_t_ptr), mask=mask_t)
    second_t = target_t + tl.cast(HALF, tl.int64) * rows
    tl.store(out_t_ptr + second_t, _transposed(second_value, out_t_ptr), mask=mask_t)


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
    rows, width = qkv.shape
    n_heads, half = grads[0].shape[1], cos.shape[1]
    out = torch.empty(rows, width, dtype=slot.dtype, device=qkv.device)
    out_t = torch.empty(width, rows, dtype=slot.dtype, device=qkv.device)
    dot = torch.empty(rows, 3 * n_heads, dtype=torch.float32, device=qkv.device)
    tile = HEADS_BACKWARD
    seq = len(cos)
    token_blocks = rows // seq * triton.cdiv(seq, tile.rows)
    partial = torch.empty(2, token_blocks * n_heads, 2 * half, dtype=torch.float32, device=qkv.device)
    for index, (grad, gain) in enumerate(zip(grads, (q_gain, k_gain, k_gain), strict=True)):
        if grad.stride(3) != 1:
            grad = grad.contiguous()
        _norm_rotate_backward_kernel[(token_blocks, n_heads)](
            qkv, grad, gain, cos, sin, out, out_t, partial[index % 2], dot, slot.scale, slot.amax,
            rows, seq, n_heads, index * n_heads,
            grad.stride(0), grad.stride(1), grad.stride(2), epsilon, slot.limit,
            NORMED=index < 2, HALF=half, BLOCK_TOKENS=tile.rows, BLOCK=triton.next_power_of_2(half),
            num_warps=tile.warps,
        )  # fmt: skip
    q_gain_grad, k_gain_grad = partial.sum(1)
    return out, out_t, q_gain_grad, k_gain_grad, dot.sum(1)


def matmul(a: Tensor, b: Tensor, a_slot: Slot, b_slot: Slot, dtype: torch.dtype) -> Tensor:
    # Fast accumulation: what the tensor cores sum stays in them, with fewer bits than FP32 (see `fp8lab.kernels`).
    return torch._scaled_mm(
        a, b.t(), scale_a=a_slot.dequantise, scale_b=b_slot.dequantise, out_dtype=dtype, use_fast_accum=True
    )


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, target_ptr, entropy_ptr, lse_ptr, vocabulary, z_loss,
    GRADIENT: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    entry = tl.arange(0, REPEAT)[:, None] * BLOCK + lane[None, :]
    logits_ptr += row * vocabulary
    # One running maximum and sum a lane, so that the loop reduces across lanes only at its end, and rescales its sum
    # once in REPEAT entries: exponentials are what a row costs besides its bytes.
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    blocks = tl.cdiv(vocabulary, REPEAT * BLOCK)
    for block in range(0, blocks):
        index = block * (REPEAT * BLOCK) + entry
        value = tl.load(logits_ptr + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
        # Maxima drop NaN; the sum keeps it.
        higher = tl.maximum(largest, tl.max(value, axis=0))
        # A lane that has seen nothing but -inf would compute inf - inf.
        shift = tl.where(higher == float("-inf"), 0.0, higher) * LOG2_E
        total = total * tl.exp2(largest * LOG2_E - shift) + tl.sum(tl.exp2(value * LOG2_E - shift[None, :]), axis=0)
        largest = higher
    row_largest = tl.max(largest, axis=0)
    lse = row_largest + tl.log(tl.sum(total * tl.exp(largest - row_largest), axis=0))
    target = tl.load(target_ptr + row)
    target_logit = tl.load(logits_ptr + target).to(tl.float32)
    tl.store(lse_ptr + row, lse)
    tl.store(entropy_ptr + row, lse - target_logit)
    if GRADIENT:
        factor = 1 + 2 * z_loss * lse
        tl.debug_barrier()
        # Read again, from the end: what was read last is still in L2.
        for block in range(0, blocks):
            index = (blocks - 1 - block) * (REPEAT * BLOCK) + entry
            mask = index < vocabulary
            value = tl.load(logits_ptr + index, mask=mask, other=float("-inf")).to(tl.float32)
            grad = tl.exp2(value * LOG2_E - lse * LOG2_E) * factor
            tl.store(logits_ptr + index, grad.to(tl.bfloat16), mask=mask)
        tl.debug_barrier()
        grad = tl.exp2(target_logit * LOG2_E - lse * LOG2_E) * factor - 1.0
        tl.store(logits_ptr + target, grad.to(tl.bfloat16))


def _run_cross_entropy(logits: Tensor, targets: Tensor, z_loss: float, *, gradient: bool) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    entropy = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(entropy)
    tile = LOGSUMEXP
    if gradient:
        tile = CROSS_ENTROPY_SHORT if vocabulary <= SHORT_VOCABULARY else CROSS_ENTROPY
    _cross_entropy_kernel[(rows,)](
        logits, targets, entropy, lse, vocabulary, z_loss,
        GRADIENT=gradient, REPEAT=tile.rows, BLOCK=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return entropy, lse


def cross_entropy_alone(logits: Tensor, targets: Tensor) -> Tensor:
    return _run_cross_entropy(logits, targets, 0.0, gradient=False)[0]


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites `logits` with their gradient."""
    entropy, lse = _run_cross_entropy(logits, targets, z_loss, gradient=True)
    return entropy, lse, logits


@triton.jit
def _logits_gradient_kernel(
    logits_ptr, target_ptr, lse_ptr, out_ptr, out_t_ptr, scale_ptr, rows, vocabulary, z_loss, limit,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < vocabulary)[None, :]
    offset = row[:, None] * vocabulary + column[None, :]
    value = tl.load(logits_ptr + offset, mask=mask, other=float("-inf")).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)
    target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    grad = tl.exp2(value * LOG2_E - (lse * LOG2_E)[:, None]) * (1 + 2 * z_loss * lse)[:, None]
    grad -= tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    quantised = _saturate(grad, tl.load(scale_ptr + 1), limit)
    tl.store(out_ptr + offset, quantised.to(out_ptr.dtype.element_ty), mask=mask)
    mask_t = (column < vocabulary)[:, None] & (row < rows)[None, :]
    tl.store(
        out_t_ptr + column[:, None] * rows + row[None, :],
        _transposed(quantised, out_t_ptr),
        mask=mask_t,
    )


def cross_entropy_quantised(
    logits: Tensor, targets: Tensor, z_loss: float, slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    entropy, lse = _run_cross_entropy(logits, targets, z_loss, gradient=False)
    out = torch.empty(rows, vocabulary, dtype=slot.dtype, device=logits.device)
    out_t = torch.empty(vocabulary, rows, dtype=slot.dtype, device=logits.device)
    _logits_gradient_kernel[_grid(rows, vocabulary, LOGITS_GRADIENT)](
        logits, targets, lse, out, out_t, slot.scale, rows, vocabulary, z_loss, slot.limit,
        BLOCK_ROWS=LOGITS_GRADIENT.rows, BLOCK_COLUMNS=LOGITS_GRADIENT.columns, num_warps=LOGITS_GRADIENT.warps,
    )  # fmt: skip
    return entropy, lse, out, out_t
