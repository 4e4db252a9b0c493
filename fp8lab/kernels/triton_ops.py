"""The Triton kernels; `fp8lab.kernels.reference` says what each computes.

Each reads its inputs once where it can. Three shapes of kernel:

- *rows*: a program holds whole rows in registers and reduces along them (RMSNorm);
- *tiles*: a program holds a tile of rows x columns and writes it in one layout or both;
- *heads*: a tile of tokens of one attention head, whose dimension is reduced (QK-norm).

What a kernel that only moves bytes costs beside them is instructions: turning numbers into FP8 and exchanging them
between threads are among those that a GPU issues at half rate. So a kernel that writes a transposed copy holds
its rows in pairs. The conversion takes two numbers at a time and saturates by itself (PTX ISA,
cvt.rn.satfinite), the two neighbours in a column are then one 16-bit integer, and those are what threads
exchange. Never FP8 bytes, of which Triton 3.6 stores a wrong transposed copy.

Raises (all that write a transposed copy): ValueError where rows, or tokens of a sequence, are an odd number.
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
    registers: int | None = None
    """At most so many a thread, the rest in memory; None: as the compiler chooses."""
    group: int = 1
    """Tiles side by side that neighbouring programs take before those below: see `_block`."""

    @property
    def launch(self) -> dict[str, int | None]:
        """Options of the launch."""
        return {"num_warps": self.warps, "maxnreg": self.registers}


FLAT = Tile(4, 512, 4)
"""Kernels that write no transposed copy: long rows, for coalescing."""
SWIGLU = Tile(4, 512, 4)
TRANSPOSED = Tile(64, 128, 8)
"""Kernels that write a transposed copy alone."""
BOTH = Tile(64, 128, 8)
"""Kernels that write both layouts."""
NORM_BACKWARD = Tile(64, 64, 4, 128, 4)
SWIGLU_BACKWARD = Tile(64, 64, 4, None, 16)
LOGITS_GRADIENT = Tile(64, 128, 8)
ROWS = Tile(4096, 0, 4)
"""Elements of whole rows that one program of a row kernel holds at most; columns are the tensor's own."""
HEADS = Tile(64, 0, 4)
"""Tokens of one attention head; columns are the head's own."""
HEADS_BACKWARD = Tile(32, 4, 2)
"""Tokens, and how many of their heads one program takes in turn."""
CROSS_ENTROPY = Tile(4, 4096, 16)
"""Entries of one row of logits at a time, as so many times so many. Few programs a processor: their rows fit in L2."""
CROSS_ENTROPY_SHORT = Tile(4, 1024, 4)
"""Rows that fit in L2 anyway."""
SHORT_VOCABULARY = 16_384
LOGSUMEXP = Tile(4, 1024, 4)

LOG2_E = tl.constexpr(1.4426950408889634)
"""The GPU's exponential is to base 2."""


@triton.jit
def _scaled(value, scale):
    """What is rounded to FP8: scaled, and NaN where the value is not finite."""
    # The conversion saturates, and would make an infinity a number. Times 0 it is NaN, and all that is finite is 0.
    return value * scale + value * 0.0


@triton.jit
def _pairs(first, second, FORMAT: tl.constexpr):
    """Two FP32 tiles rounded to FP8, as one of 16-bit integers: `first` in the lower byte, which memory holds first."""
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite." + FORMAT + "x2.f32 $0, $2, $1;", "=h,f,f", [first, second],
        dtype=tl.int16, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _largest(first, second):
    """The larger magnitude of each two; of a NaN and a number the number."""
    return tl.maximum(tl.abs(first), tl.abs(second))


@triton.jit
def _raise_amax(amax_ptr, amax):
    # Most tiles do not raise it: reading is cheaper than a contended atomic.
    tl.atomic_max(amax_ptr, amax, mask=amax > tl.load(amax_ptr))


@triton.jit
def _observe(amax_ptr, value):
    """Raise the amax to that of a tile's finite values."""
    magnitude = tl.abs(value)
    # The maximum drops NaN; an infinity is rare, and only then are the finite values picked out.
    amax = tl.max(magnitude)
    if amax == float("inf"):
        amax = tl.max(_finite_magnitude(value))
    _raise_amax(amax_ptr, amax)


@triton.jit
def _observe_two(amax_ptr, first, second):
    """`_observe` of two tiles."""
    amax = tl.max(_largest(first, second))
    if amax == float("inf"):
        amax = tl.max(_largest(_finite_magnitude(first), _finite_magnitude(second)))
    _raise_amax(amax_ptr, amax)


@triton.jit
def _observe_four(amax_ptr, a, b, c, d):
    """`_observe` of four tiles."""
    amax = tl.max(tl.maximum(_largest(a, b), _largest(c, d)))
    if amax == float("inf"):
        first = _largest(_finite_magnitude(a), _finite_magnitude(b))
        amax = tl.max(tl.maximum(first, _largest(_finite_magnitude(c), _finite_magnitude(d))))
    _raise_amax(amax_ptr, amax)


@triton.jit
def _finite_magnitude(value):
    """Absolute values, 0 for what is not finite."""
    magnitude = tl.abs(value)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def _quantise_kernel(
    x_ptr, out_ptr, scale_ptr, amax_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    _observe(amax_ptr, x)
    value = _scaled(x, tl.load(scale_ptr + 1))
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _block(GROUP: tl.constexpr):
    """This program's block of rows and of columns, by the order in which programs start.

    What runs at the same time should read and write memory that lies together. Down a column, the transposed copy
    does and rows are read in scraps; along a row it is the reverse. GROUP blocks of columns in turn are between them.
    """
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    if GROUP > 1:
        row_blocks = tl.num_programs(0)
        program = column_block * row_blocks + row_block
        first = program // (GROUP * row_blocks) * GROUP
        columns = tl.minimum(tl.num_programs(1) - first, GROUP)
        inside = program - first * row_blocks
        row_block, column_block = inside // columns, first + inside % columns
    return row_block, column_block


@triton.jit
def _row_pairs(block, rows, BLOCK_ROWS: tl.constexpr):
    """The first of a block's pairs of rows, the pairs after it, and which of them exist."""
    first = block.to(tl.int64) * (BLOCK_ROWS // 2)
    pair = tl.arange(0, BLOCK_ROWS // 2)
    return first, pair, pair < rows // 2 - first


@triton.jit
def _columns(block, columns, BLOCK_COLUMNS: tl.constexpr):
    """The first of a block's columns, the columns after it, and which of them exist."""
    first = block.to(tl.int64) * BLOCK_COLUMNS
    column = tl.arange(0, BLOCK_COLUMNS)
    return first, column, column < columns - first


@triton.jit
def _store_transposed(out_t_ptr, value, first_pair, pair, has_pair, first_column, column, has_column, rows):
    """Store `value`, pairs of rows, as (columns, rows): the first of a pair before the second."""
    pairs = rows // 2
    out_t_ptr += first_column * pairs + first_pair
    mask = has_column[:, None] & has_pair[None, :]
    tl.store(out_t_ptr + (column[:, None] * pairs + pair[None, :]), tl.trans(value), mask=mask)


@triton.jit
def _quantise_pairs_kernel(
    x_ptr, out_ptr, out_t_ptr, scale_ptr, amax_ptr, rows, columns,
    FORMAT: tl.constexpr, ROW_MAJOR: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _block(GROUP)
    first_pair, pair, has_pair = _row_pairs(row_block, rows, BLOCK_ROWS)
    first_column, column, has_column = _columns(column_block, columns, BLOCK_COLUMNS)
    mask = has_pair[:, None] & has_column[None, :]
    start = 2 * first_pair * columns + first_column
    offset = pair[:, None] * (2 * columns) + column[None, :]
    even = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + start + columns + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + 1)
    if ROW_MAJOR:
        _observe_two(amax_ptr, even, odd)
    even, odd = _scaled(even, scale), _scaled(odd, scale)
    if ROW_MAJOR:
        tl.store(out_ptr + start + offset, even.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + start + columns + offset, odd.to(out_ptr.dtype.element_ty), mask=mask)
    value = _pairs(even, odd, FORMAT)
    _store_transposed(out_t_ptr, value, first_pair, pair, has_pair, first_column, column, has_column, rows)


def _grid(rows: int, columns: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)


def _format(slot: Slot) -> str:
    """Name of the slot's format in PTX."""
    return "e4m3" if slot.dtype == torch.float8_e4m3fn else "e5m2"


def _transposed(rows: int, columns: int, slot: Slot) -> tuple[Tensor, Tensor]:
    """An empty transposed copy (columns, rows) FP8, and the same memory as pairs of rows (columns, rows / 2)."""
    if rows % 2:
        raise ValueError(f"{rows} rows: a transposed copy holds pairs of rows")
    out_t = torch.empty(columns, rows, dtype=slot.dtype, device=slot.scale.device)
    return out_t, out_t.view(torch.int16)


def quantise(x: Tensor, slot: Slot) -> Tensor:
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=slot.dtype, device=x.device)
    _quantise_kernel[_grid(rows, columns, FLAT)](
        x, out, slot.scale, slot.amax, rows, columns,
        BLOCK_ROWS=FLAT.rows, BLOCK_COLUMNS=FLAT.columns, **FLAT.launch,
    )  # fmt: skip
    return out


def quantise_transposed(x: Tensor, slot: Slot) -> Tensor:
    return _quantise_pairs(x, slot, TRANSPOSED, row_major=False)[1]


def quantise_both(x: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    return _quantise_pairs(x, slot, BOTH, row_major=True)


def _quantise_pairs(x: Tensor, slot: Slot, tile: Tile, *, row_major: bool) -> tuple[Tensor, Tensor]:
    """The row-major copy, empty if it is not wanted, and the transposed one; the amax is gathered with the former."""
    rows, columns = x.shape
    out = torch.empty((rows, columns) if row_major else (0,), dtype=slot.dtype, device=x.device)
    out_t, pairs = _transposed(rows, columns, slot)
    _quantise_pairs_kernel[_grid(rows, columns, tile)](
        x, out, pairs, slot.scale, slot.amax, rows, columns, FORMAT=_format(slot), ROW_MAJOR=row_major,
        GROUP=tile.group, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, **tile.launch,
    )  # fmt: skip
    return out, out_t


@triton.jit
def _rms_norm_kernel(
    x_ptr, branch_ptr, gain_ptr, total_ptr, rstd_ptr, out_ptr, scale_ptr, amax_ptr, rows, d, epsilon,
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
    tl.store(out_ptr + offset, _scaled(normed, tl.load(scale_ptr + 1)).to(out_ptr.dtype.element_ty), mask=mask)


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
        HAS_BRANCH=branch is not None, BLOCK_ROWS=block_rows, BLOCK=block, **ROWS.launch,
    )  # fmt: skip
    return total, rstd, out


@triton.jit
def _norm_gradients(grad_ptr, x_ptr, residual_ptr, rstd_ptr, dot_ptr, gain, has_row, offset, mask, d):
    """Of some rows: the normed row, the gradient of x, and what each element adds to the gradient of the gain."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr, mask=has_row, other=0.0)[:, None]
    mean = (tl.load(dot_ptr, mask=has_row, other=0.0) / d)[:, None]
    unit = x * rstd
    grad_x = ((grad * gain - unit * mean) * rstd + residual).to(tl.bfloat16)
    return unit * gain, grad_x, grad * unit


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, rstd_ptr, gain_ptr, dot_ptr, residual_ptr, grad_x_ptr, normed_t_ptr, out_ptr, out_t_ptr,
    partial_ptr, scale_ptr, grad_scale_ptr, amax_ptr, rows, d, FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr,
    QUANTISE: tl.constexpr, TRANSPOSED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _block(GROUP)
    first_pair, pair, has_pair = _row_pairs(row_block, rows, BLOCK_ROWS)
    first_column, column, has_column = _columns(column_block, d, BLOCK_COLUMNS)
    mask = has_pair[:, None] & has_column[None, :]
    even = 2 * first_pair * d + first_column + (pair[:, None] * (2 * d) + column[None, :])
    row = 2 * first_pair + 2 * pair
    gain = tl.load(gain_ptr + first_column + column, mask=has_column, other=0.0)[None, :]
    normed_0, grad_0, gain_grad_0 = _norm_gradients(
        grad_ptr, x_ptr, residual_ptr, rstd_ptr + row, dot_ptr + row, gain, has_pair, even, mask, d
    )
    normed_1, grad_1, gain_grad_1 = _norm_gradients(
        grad_ptr, x_ptr, residual_ptr, rstd_ptr + row + 1, dot_ptr + row + 1, gain, has_pair, even + d, mask, d
    )
    tl.store(grad_x_ptr + even, grad_0, mask=mask)
    tl.store(grad_x_ptr + even + d, grad_1, mask=mask)
    gain_grad = tl.sum(gain_grad_0 + gain_grad_1, axis=0)
    tl.store(partial_ptr + row_block.to(tl.int64) * d + first_column + column, gain_grad, mask=has_column)
    scale = tl.load(scale_ptr + 1)
    normed = _pairs(_scaled(normed_0, scale), _scaled(normed_1, scale), FORMAT)
    _store_transposed(normed_t_ptr, normed, first_pair, pair, has_pair, first_column, column, has_column, rows)
    if QUANTISE:
        # What is stored, so that the copies are those of the BF16 gradient.
        grad_0, grad_1 = grad_0.to(tl.float32), grad_1.to(tl.float32)
        _observe_two(amax_ptr, grad_0, grad_1)
        scale = tl.load(grad_scale_ptr + 1)
        grad_0, grad_1 = _scaled(grad_0, scale), _scaled(grad_1, scale)
        tl.store(out_ptr + even, grad_0.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + even + d, grad_1.to(out_ptr.dtype.element_ty), mask=mask)
        if TRANSPOSED:
            grad = _pairs(grad_0, grad_1, GRAD_FORMAT)
            _store_transposed(out_t_ptr, grad, first_pair, pair, has_pair, first_column, column, has_column, rows)


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
    normed_t, normed_pairs = _transposed(rows, d, slot)
    partial = torch.empty(grid[0], d, dtype=torch.float32, device=x.device)
    target = grad_slot or slot
    out = out_t = None
    pairs = normed_pairs
    if grad_slot is not None:
        out = torch.empty(rows, d, dtype=grad_slot.dtype, device=x.device)
        if transposed:
            out_t, pairs = _transposed(rows, d, grad_slot)
    _rms_norm_backward_kernel[grid](
        grad_normed, x, rstd, gain, dot, grad_residual, grad_x, normed_pairs, normed_t if out is None else out, pairs,
        partial, slot.scale, target.scale, target.amax, rows, d, FORMAT=_format(slot), GRAD_FORMAT=_format(target),
        QUANTISE=out is not None, TRANSPOSED=out_t is not None,
        GROUP=tile.group, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, **tile.launch,
    )  # fmt: skip
    return grad_x, partial.sum(0), normed_t, out, out_t


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, out_ptr, scale_ptr, amax_ptr, rows, d_ff,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < d_ff)[None, :]
    source = row[:, None] * (2 * d_ff) + column[None, :]
    gate = tl.load(gate_up_ptr + source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + source + d_ff, mask=mask, other=0.0).to(tl.float32)
    activated = gate * _sigmoid(gate) * up
    _observe(amax_ptr, activated)
    value = _scaled(activated, tl.load(scale_ptr + 1))
    offset = row[:, None] * d_ff + column[None, :]
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up: Tensor, slot: Slot) -> Tensor:
    rows, d_ff = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, d_ff, dtype=slot.dtype, device=gate_up.device)
    _swiglu_kernel[_grid(rows, d_ff, SWIGLU)](
        gate_up, out, slot.scale, slot.amax, rows, d_ff,
        BLOCK_ROWS=SWIGLU.rows, BLOCK_COLUMNS=SWIGLU.columns, **SWIGLU.launch,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_gradients(gate_up_ptr, grad_ptr, mask, d_ff):
    """Of some rows: the activation, the gradients of gate and of up, and each row's sum of both times gate and up."""
    gate = tl.load(gate_up_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + d_ff, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    grad_up = grad * silu
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return silu * up, grad_gate, grad_up, tl.sum(grad_gate * gate + grad_up * up, axis=1)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr, grad_ptr, out_ptr, out_t_ptr, activated_t_ptr, dot_ptr, grad_scale_ptr, amax_ptr, scale_ptr,
    rows, d_ff, FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _block(GROUP)
    first_pair, pair, has_pair = _row_pairs(row_block, rows, BLOCK_ROWS)
    first_column, column, has_column = _columns(column_block, d_ff, BLOCK_COLUMNS)
    mask = has_pair[:, None] & has_column[None, :]
    start = 2 * first_pair * d_ff
    gate_up = 2 * start + first_column + (pair[:, None] * (4 * d_ff) + column[None, :])
    grad = start + first_column + (pair[:, None] * (2 * d_ff) + column[None, :])
    activated_0, gate_0, up_0, dot_0 = _swiglu_gradients(gate_up_ptr + gate_up, grad_ptr + grad, mask, d_ff)
    activated_1, gate_1, up_1, dot_1 = _swiglu_gradients(
        gate_up_ptr + gate_up + 2 * d_ff, grad_ptr + grad + d_ff, mask, d_ff
    )
    programs = tl.num_programs(1)
    dot_ptr += 2 * (first_pair + pair) * programs + column_block
    tl.store(dot_ptr, dot_0, mask=has_pair)
    tl.store(dot_ptr + programs, dot_1, mask=has_pair)
    _observe_four(amax_ptr, gate_0, up_0, gate_1, up_1)

    scale = tl.load(scale_ptr + 1)
    value = _pairs(_scaled(activated_0, scale), _scaled(activated_1, scale), FORMAT)
    _store_transposed(activated_t_ptr, value, first_pair, pair, has_pair, first_column, column, has_column, rows)

    scale = tl.load(grad_scale_ptr + 1)
    out_ptr += gate_up
    gate_0, gate_1 = _scaled(gate_0, scale), _scaled(gate_1, scale)
    tl.store(out_ptr, gate_0.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + 2 * d_ff, gate_1.to(out_ptr.dtype.element_ty), mask=mask)
    value = _pairs(gate_0, gate_1, GRAD_FORMAT)
    _store_transposed(out_t_ptr, value, first_pair, pair, has_pair, first_column, column, has_column, rows)
    up_0, up_1 = _scaled(up_0, scale), _scaled(up_1, scale)
    tl.store(out_ptr + d_ff, up_0.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + 3 * d_ff, up_1.to(out_ptr.dtype.element_ty), mask=mask)
    value = _pairs(up_0, up_1, GRAD_FORMAT)
    _store_transposed(out_t_ptr, value, first_pair, pair, has_pair, first_column + d_ff, column, has_column, rows)


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, slot: Slot, grad_slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, d_ff = grad.shape
    tile = SWIGLU_BACKWARD
    grid = _grid(rows, d_ff, tile)
    out = torch.empty(rows, 2 * d_ff, dtype=grad_slot.dtype, device=grad.device)
    out_t, pairs = _transposed(rows, 2 * d_ff, grad_slot)
    activated_t, activated_pairs = _transposed(rows, d_ff, slot)
    dot = torch.empty(rows, grid[1], dtype=torch.float32, device=grad.device)
    _swiglu_backward_kernel[grid](
        gate_up, grad, out, pairs, activated_pairs, dot, grad_slot.scale, grad_slot.amax, slot.scale, rows, d_ff,
        FORMAT=_format(slot), GRAD_FORMAT=_format(grad_slot),
        GROUP=tile.group, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, **tile.launch,
    )  # fmt: skip
    return out, out_t, activated_t, dot.sum(1)


@triton.jit
def _block_of_tokens(seq, BLOCK_TOKENS: tl.constexpr):
    """Sequence of this program and the first of its tokens in it: a block lies within one, or each row would divide."""
    blocks = tl.cdiv(seq, BLOCK_TOKENS)
    sequence = tl.program_id(0) // blocks
    return sequence.to(tl.int64), (tl.program_id(0) - sequence * blocks) * BLOCK_TOKENS


@triton.jit
def _norm_rotate_kernel(
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, out_ptr, seq, n_heads, epsilon,
    HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, first_token = _block_of_tokens(seq, BLOCK_TOKENS)
    token = (first_token + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
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
        HALF=half, BLOCK_TOKENS=HEADS.rows, BLOCK=triton.next_power_of_2(half), **HEADS.launch,
    )  # fmt: skip
    return out


@triton.jit
def _rotated_gradients(
    grad_ptr, x_ptr, cos_ptr, sin_ptr, gain_0, gain_1, gain_grad_0, gain_grad_1, mask, epsilon, HALF: tl.constexpr
):
    """Of some tokens of one head of q or k, by halves: gradients; the gain's gradients, added up; and dot."""
    grad_0 = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    grad_1 = tl.load(grad_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    x_0 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x_1 = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr, mask=mask, other=0.0)
    sin = tl.load(sin_ptr, mask=mask, other=0.0)
    square = tl.sum(x_0 * x_0 + x_1 * x_1, axis=1)
    rstd = tl.rsqrt(square / (2 * HALF) + epsilon)
    # The normed vector's gradient over its root mean square, so that x itself need not be normed.
    back_0 = (grad_0 * cos + grad_1 * sin) * rstd[:, None]
    back_1 = (grad_1 * cos - grad_0 * sin) * rstd[:, None]
    gain_grad_0 += back_0 * x_0
    gain_grad_1 += back_1 * x_1
    back_0 *= gain_0
    back_1 *= gain_1
    mean = tl.sum(back_0 * x_0 + back_1 * x_1, axis=1) / (2 * HALF)
    along = mean * rstd * rstd
    grad_0 = back_0 - x_0 * along[:, None]
    grad_1 = back_1 - x_1 * along[:, None]
    # A normed vector's gradient is orthogonal to it but for epsilon.
    return grad_0, grad_1, gain_grad_0, gain_grad_1, mean * (2 * HALF - square * rstd * rstd)


@triton.jit
def _plain_gradients(grad_ptr, x_ptr, mask, HALF: tl.constexpr):
    """`_rotated_gradients` of v, which is neither normed nor rotated: gradients, by halves, and dot."""
    grad_0 = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    grad_1 = tl.load(grad_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    x_0 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x_1 = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    return grad_0, grad_1, tl.sum(grad_0 * x_0 + grad_1 * x_1, axis=1)


@triton.jit
def _norm_rotate_backward_kernel(
    qkv_ptr, grad_ptr, gain_ptr, cos_ptr, sin_ptr, out_ptr, out_t_ptr, partial_ptr, dot_ptr, scale_ptr, amax_ptr,
    rows, seq, n_heads, part, batch_stride, head_stride, token_stride, epsilon,
    FORMAT: tl.constexpr, NORMED: tl.constexpr, HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, first_token = _block_of_tokens(seq, BLOCK_TOKENS)
    first_row = sequence * seq + first_token
    pair = tl.arange(0, BLOCK_TOKENS // 2)
    lane = tl.arange(0, BLOCK)
    has_pair = pair < (seq - first_token) // 2
    in_half = lane < HALF
    mask = has_pair[:, None] & in_half[None, :]
    width = 3 * n_heads * 2 * HALF
    angle = (first_token + 2 * pair)[:, None] * HALF + lane[None, :]
    grad_ptr += sequence * batch_stride + first_token * tl.cast(token_stride, tl.int64)
    grad_ptrs = grad_ptr + (2 * pair[:, None] * token_stride + lane[None, :])
    start = first_row * width + part * n_heads * 2 * HALF
    offset = pair[:, None] * (2 * width) + lane[None, :]
    gain_0 = tl.load(gain_ptr + lane, mask=in_half, other=0.0)[None, :]
    gain_1 = tl.load(gain_ptr + HALF + lane, mask=in_half, other=0.0)[None, :]
    scale = tl.load(scale_ptr + 1)
    # Added up over heads, so that the gains' gradients are summed over tokens once for all of them.
    gain_grad_0 = tl.zeros((BLOCK_TOKENS // 2, BLOCK), dtype=tl.float32)
    gain_grad_1 = tl.zeros((BLOCK_TOKENS // 2, BLOCK), dtype=tl.float32)
    dot_even = tl.zeros((BLOCK_TOKENS // 2,), dtype=tl.float32)
    dot_odd = tl.zeros((BLOCK_TOKENS // 2,), dtype=tl.float32)
    first_head = tl.program_id(1) * BLOCK_HEADS
    for head in range(first_head, tl.minimum(first_head + BLOCK_HEADS, n_heads)):
        x = qkv_ptr + start + head * (2 * HALF) + offset
        grad = grad_ptrs + head * tl.cast(head_stride, tl.int64)
        if NORMED:
            even_0, even_1, gain_grad_0, gain_grad_1, dot = _rotated_gradients(
                grad, x, cos_ptr + angle, sin_ptr + angle, gain_0, gain_1, gain_grad_0, gain_grad_1, mask, epsilon, HALF
            )
            dot_even += dot
            odd_0, odd_1, gain_grad_0, gain_grad_1, dot = _rotated_gradients(
                grad + token_stride, x + width, cos_ptr + angle + HALF, sin_ptr + angle + HALF,
                gain_0, gain_1, gain_grad_0, gain_grad_1, mask, epsilon, HALF,
            )  # fmt: skip
            dot_odd += dot
        else:
            even_0, even_1, dot = _plain_gradients(grad, x, mask, HALF)
            dot_even += dot
            odd_0, odd_1, dot = _plain_gradients(grad + token_stride, x + width, mask, HALF)
            dot_odd += dot
        _observe_four(amax_ptr, even_0, even_1, odd_0, odd_1)
        column = (part * n_heads + head) * (2 * HALF)
        out = out_ptr + start + head * (2 * HALF) + offset
        even_0, odd_0 = _scaled(even_0, scale), _scaled(odd_0, scale)
        tl.store(out, even_0.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + width, odd_0.to(out_ptr.dtype.element_ty), mask=mask)
        value = _pairs(even_0, odd_0, FORMAT)
        _store_transposed(out_t_ptr, value, first_row // 2, pair, has_pair, column.to(tl.int64), lane, in_half, rows)
        even_1, odd_1 = _scaled(even_1, scale), _scaled(odd_1, scale)
        tl.store(out + HALF, even_1.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF + width, odd_1.to(out_ptr.dtype.element_ty), mask=mask)
        value = _pairs(even_1, odd_1, FORMAT)
        column += HALF
        _store_transposed(out_t_ptr, value, first_row // 2, pair, has_pair, column.to(tl.int64), lane, in_half, rows)
    groups = tl.num_programs(1)
    dot_ptr += (first_row + 2 * pair) * (3 * groups) + part * groups + tl.program_id(1)
    tl.store(dot_ptr, dot_even, mask=has_pair)
    tl.store(dot_ptr + 3 * groups, dot_odd, mask=has_pair)
    if NORMED:
        partial_ptr += (tl.program_id(0).to(tl.int64) * groups + tl.program_id(1)) * 2 * HALF + lane
        tl.store(partial_ptr, tl.sum(gain_grad_0, axis=0), mask=in_half)
        tl.store(partial_ptr + HALF, tl.sum(gain_grad_1, axis=0), mask=in_half)


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
    n_heads, half, seq = grads[0].shape[1], cos.shape[1], len(cos)
    if seq % 2:
        raise ValueError(f"context of {seq} tokens: a transposed copy holds pairs of tokens")
    out = torch.empty(rows, width, dtype=slot.dtype, device=qkv.device)
    out_t, pairs = _transposed(rows, width, slot)
    tile = HEADS_BACKWARD
    token_blocks, groups = rows // seq * triton.cdiv(seq, tile.rows), triton.cdiv(n_heads, tile.columns)
    dot = torch.empty(rows, 3 * groups, dtype=torch.float32, device=qkv.device)
    partial = torch.empty(2, token_blocks * groups, 2 * half, dtype=torch.float32, device=qkv.device)
    for part, (grad, gain) in enumerate(zip(grads, (q_gain, k_gain, k_gain), strict=True)):
        if grad.stride(3) != 1:
            grad = grad.contiguous()
        _norm_rotate_backward_kernel[(token_blocks, groups)](
            qkv, grad, gain, cos, sin, out, pairs, partial[part % 2], dot, slot.scale, slot.amax,
            rows, seq, n_heads, part, grad.stride(0), grad.stride(1), grad.stride(2), epsilon, FORMAT=_format(slot),
            NORMED=part < 2, HALF=half, BLOCK_TOKENS=tile.rows, BLOCK_HEADS=tile.columns,
            BLOCK=triton.next_power_of_2(half), **tile.launch,
        )  # fmt: skip
    q_gain_grad, k_gain_grad = partial.sum(1)
    return out, out_t, q_gain_grad, k_gain_grad, dot.sum(1)


def matmul(a: Tensor, b: Tensor, a_slot: Slot, b_slot: Slot, dtype: torch.dtype, fast: bool) -> Tensor:
    return torch._scaled_mm(
        a, b.t(), scale_a=a_slot.dequantise, scale_b=b_slot.dequantise, out_dtype=dtype, use_fast_accum=fast
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
            grad = tl.exp2((value - lse) * LOG2_E) * factor
            tl.store(logits_ptr + index, grad.to(tl.bfloat16), mask=mask)
        tl.debug_barrier()
        grad = tl.exp2((target_logit - lse) * LOG2_E) * factor - 1.0
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
        GRADIENT=gradient, REPEAT=tile.rows, BLOCK=tile.columns, **tile.launch,
    )  # fmt: skip
    return entropy, lse


def cross_entropy_alone(logits: Tensor, targets: Tensor) -> Tensor:
    return _run_cross_entropy(logits, targets, 0.0, gradient=False)[0]


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites `logits` with their gradient."""
    entropy, lse = _run_cross_entropy(logits, targets, z_loss, gradient=True)
    return entropy, lse, logits


@triton.jit
def _gradients_of_logits(logits_ptr, target_ptr, lse_ptr, has_row, offset, mask, column, z_loss):
    """Of some rows: softmax minus one-hot, and what the z-loss adds."""
    value = tl.load(logits_ptr + offset, mask=mask, other=float("-inf")).to(tl.float32)
    lse = tl.load(lse_ptr, mask=has_row, other=0.0)
    target = tl.load(target_ptr, mask=has_row, other=-1)
    grad = tl.exp2((value - lse[:, None]) * LOG2_E) * (1 + 2 * z_loss * lse)[:, None]
    return grad - tl.where(column == target[:, None], 1.0, 0.0)


@triton.jit
def _logits_gradient_kernel(
    logits_ptr, target_ptr, lse_ptr, out_ptr, out_t_ptr, scale_ptr, rows, vocabulary, z_loss,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _block(GROUP)
    first_pair, pair, has_pair = _row_pairs(row_block, rows, BLOCK_ROWS)
    first_column, column, has_column = _columns(column_block, vocabulary, BLOCK_COLUMNS)
    mask = has_pair[:, None] & has_column[None, :]
    even = 2 * first_pair * vocabulary + first_column + (pair[:, None] * (2 * vocabulary) + column[None, :])
    row = 2 * first_pair + 2 * pair
    entry = (first_column + column)[None, :]
    grad_0 = _gradients_of_logits(logits_ptr, target_ptr + row, lse_ptr + row, has_pair, even, mask, entry, z_loss)
    odd = even + vocabulary
    grad_1 = _gradients_of_logits(
        logits_ptr, target_ptr + row + 1, lse_ptr + row + 1, has_pair, odd, mask, entry, z_loss
    )
    scale = tl.load(scale_ptr + 1)
    grad_0, grad_1 = _scaled(grad_0, scale), _scaled(grad_1, scale)
    tl.store(out_ptr + even, grad_0.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + odd, grad_1.to(out_ptr.dtype.element_ty), mask=mask)
    value = _pairs(grad_0, grad_1, FORMAT)
    _store_transposed(out_t_ptr, value, first_pair, pair, has_pair, first_column, column, has_column, rows)


def cross_entropy_quantised(
    logits: Tensor, targets: Tensor, z_loss: float, slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    entropy, lse = _run_cross_entropy(logits, targets, z_loss, gradient=False)
    out = torch.empty(rows, vocabulary, dtype=slot.dtype, device=logits.device)
    out_t, pairs = _transposed(rows, vocabulary, slot)
    tile = LOGITS_GRADIENT
    _logits_gradient_kernel[_grid(rows, vocabulary, tile)](
        logits, targets, lse, out, pairs, slot.scale, rows, vocabulary, z_loss, FORMAT=_format(slot),
        GROUP=tile.group, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, **tile.launch,
    )  # fmt: skip
    return entropy, lse, out, out_t
