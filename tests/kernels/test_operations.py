"""Each Triton kernel computes what its plain-PyTorch reference does, on ordinary and on nasty inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fp8lab.config import FusedConfig
from fp8lab.kernels import reference
from fp8lab.kernels.operations import operations
from fp8lab.kernels.scaling import Slot, set_current_scale

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BATCH, SEQ, HEADS, HEAD_DIM, D_FF, VOCABULARY = 2, 48, 3, 16, 112, 304
D_MODEL, ROWS = HEADS * HEAD_DIM, BATCH * SEQ
# None is a multiple of a kernel's block: 96 rows, 48 and 112 columns.


def slot(device: torch.device, dtype: torch.dtype = E4M3, scale: float = 16.0) -> Slot:
    return Slot(torch.tensor([1 / scale, scale, 0, 0], device=device), torch.zeros(4, device=device), dtype)


def values(kind: str, *shape: int, seed: int = 1) -> Tensor:
    """BF16 test data on the CPU: one kind of trouble each."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "zeros":
            x.zero_()
        case "outlier":
            x[3, 5] = 1e6
        case "tiny":
            x *= 1e-30
        case "infinite":
            x[3, 5], x[-1, 1] = torch.inf, -torch.inf
        case "nan":
            x[3, 5] = torch.nan
    return x.bfloat16()


KINDS = ["random", "zeros", "outlier", "tiny", "infinite", "nan"]


@dataclass
class Case:
    """One call of one operation: its outputs and the amax it gathered."""

    outputs: tuple[Tensor, ...]
    amax: Tensor


def quantise(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    return Case((ops.quantise(values(kind, ROWS, D_MODEL).to(device), s),), s.amax)


def quantise_both(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device, E5M2)
    return Case(ops.quantise_both(values(kind, ROWS, D_MODEL).float().to(device), s), s.amax)


def quantise_transposed(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    return Case((ops.quantise_transposed(values(kind, ROWS, D_MODEL).to(device), s),), s.amax)


def gain(device: torch.device, size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size, device=device)


def rms_norm(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    x, branch = values(kind, ROWS, D_MODEL).to(device), values("random", ROWS, D_MODEL, seed=2).to(device)
    return Case(ops.rms_norm(x, branch, gain(device, D_MODEL), 1e-6, s), s.amax)


def rms_norm_alone(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    return Case(ops.rms_norm(values(kind, ROWS, D_MODEL).to(device), None, gain(device, D_MODEL), 1e-6, s), s.amax)


def _rms_norm_backward(
    ops: ModuleType, kind: str, device: torch.device, grad_slot: Slot | None, *, transposed: bool
) -> tuple[Tensor, ...]:
    grad, x, residual = (values(k, ROWS, D_MODEL, seed=i).to(device) for i, k in enumerate([kind, "random", "random"]))
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-6)
    g = gain(device, D_MODEL)
    dot = (grad.float() * x.float() * rstd[:, None] * g).sum(-1)
    outputs = ops.rms_norm_backward(grad, x, rstd, g, dot, residual, slot(device), grad_slot, transposed)
    return tuple(output for output in outputs if output is not None)


def rms_norm_backward(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device, E5M2, 4.0)
    return Case(_rms_norm_backward(ops, kind, device, s, transposed=True), s.amax)


def rms_norm_backward_rows_alone(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    return Case(_rms_norm_backward(ops, kind, device, s, transposed=False), s.amax)


def rms_norm_backward_of_the_first_block(ops: ModuleType, kind: str, device: torch.device) -> Case:
    return Case(_rms_norm_backward(ops, kind, device, None, transposed=True), torch.zeros(4))


def normed_in_both_layouts(ops: ModuleType, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """By the forward pass, and again by the backward one."""
    x, g, s = values(kind, ROWS, D_MODEL).to(device), gain(device, D_MODEL), slot(device)
    _, rstd, normed = ops.rms_norm(x, None, g, 1e-6, s)
    zeros = torch.zeros_like(x)
    return normed, ops.rms_norm_backward(zeros, x, rstd, g, torch.zeros_like(rstd), zeros, s, None, False)[2]


def swiglu(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    return Case((ops.swiglu(values(kind, ROWS, 2 * D_FF).to(device), s),), s.amax)


def swiglu_backward(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s, grad_slot = slot(device), slot(device, E5M2, 64.0)
    gate_up, grad = values(kind, ROWS, 2 * D_FF).to(device), values("random", ROWS, D_FF, seed=2).to(device)
    return Case(ops.swiglu_backward(gate_up, grad, s, grad_slot), grad_slot.amax)


def angles(device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(SEQ, device=device).float(), torch.linspace(1, 0.01, HEAD_DIM // 2, device=device))
    return angle.cos(), angle.sin()


def norm_rotate(ops: ModuleType, kind: str, device: torch.device) -> Case:
    qkv = values(kind, ROWS, 3 * D_MODEL).to(device)
    g = gain(device, HEAD_DIM)
    return Case((ops.norm_rotate(qkv, g, g.flip(0).contiguous(), *angles(device), HEADS, 1e-6),), torch.zeros(4))


def norm_rotate_backward(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device)
    qkv = values(kind, ROWS, 3 * D_MODEL).to(device)
    shape = (BATCH, SEQ, HEADS, HEAD_DIM)
    # Strides as attention's backward returns them, and others.
    q, k, v = (values("random", ROWS, D_MODEL, seed=i).to(device).view(shape).transpose(1, 2) for i in range(3))
    g = gain(device, HEAD_DIM)
    grads = (q, k.contiguous(), v)
    return Case(ops.norm_rotate_backward(qkv, grads, g, g.flip(0).contiguous(), *angles(device), 1e-6, s), s.amax)


def logits_and_targets(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    targets = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(3))
    return values(kind, ROWS, VOCABULARY).to(device) * 4, targets.to(device)


def cross_entropy(ops: ModuleType, kind: str, device: torch.device) -> Case:
    return Case(ops.cross_entropy(*logits_and_targets(kind, device), 1e-3), torch.zeros(4))


def cross_entropy_alone(ops: ModuleType, kind: str, device: torch.device) -> Case:
    return Case((ops.cross_entropy_alone(*logits_and_targets(kind, device)),), torch.zeros(4))


def cross_entropy_quantised(ops: ModuleType, kind: str, device: torch.device) -> Case:
    s = slot(device, E5M2, 2.0**15)
    return Case(ops.cross_entropy_quantised(*logits_and_targets(kind, device), 1e-3, s), s.amax)


CASES: list[Callable[[ModuleType, str, torch.device], Case]] = [
    quantise, quantise_both, quantise_transposed, rms_norm, rms_norm_alone, rms_norm_backward,
    rms_norm_backward_rows_alone, rms_norm_backward_of_the_first_block, swiglu, swiglu_backward, norm_rotate,
    norm_rotate_backward, cross_entropy, cross_entropy_alone, cross_entropy_quantised,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_kernel_agrees_with_reference(case, kind, device) -> None:
    expected, actual = case(reference, kind, device), case(operations(emulate=False), kind, device)
    torch.testing.assert_close(actual.amax, expected.amax, rtol=1e-5, atol=0)
    for position, (got, wanted) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert_close(got.float(), wanted.float(), wanted.dtype, f"output {position}")


@pytest.mark.parametrize("group", [3, 99])
@pytest.mark.parametrize(
    "case", [quantise_both, quantise_transposed, rms_norm_backward, swiglu_backward, cross_entropy_quantised]
)
def test_the_order_of_tiles_changes_no_bit(case, group, device, monkeypatch) -> None:
    """Groups that divide the columns' blocks, groups that do not, and one of them all."""
    ops = operations(emulate=False)

    def run(tile) -> Case:
        for constant in ("BOTH", "TRANSPOSED", "NORM_BACKWARD", "SWIGLU_BACKWARD", "LOGITS_GRADIENT"):
            monkeypatch.setattr(ops, constant, tile)
        return case(ops, "random", device)

    one, other = run(ops.Tile(16, 16, 4)), run(ops.Tile(16, 16, 4, group=group))
    assert torch.equal(one.amax, other.amax)
    for got, wanted in zip(other.outputs, one.outputs, strict=True):
        assert torch.equal(got.view(torch.int8), wanted.view(torch.int8))


# One rounding step of each format, relative: sums in another order may cross a rounding boundary.
STEP = {torch.float32: 2e-5, torch.bfloat16: 2**-7, E4M3: 2**-3, E5M2: 2**-2}


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    # Whether a sum over an infinity is one or is NaN depends on its order; that it is no number does not.
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: not finite in other places"
    got, wanted = got[finite], wanted[finite]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (got - wanted).abs()
    allowed = STEP[dtype] * wanted.abs() + smallest
    if dtype in (torch.float32, torch.bfloat16) and len(wanted):
        # A sum over rows may cancel: what it cancels to is as inexact as its terms.
        allowed += 1e-4 + 1e-5 * wanted.abs().max()
    assert (error <= allowed).all(), f"{what}: off by {error.max()}"
    if dtype in (E4M3, E5M2) and len(got):
        assert (got != wanted).float().mean() < 0.01, f"{what}: too many differ"


@pytest.mark.parametrize("rows", [1, 95])
def test_an_odd_number_of_rows_is_refused_before_it_is_half_written(rows, device) -> None:
    ops, x = operations(emulate=False), torch.ones(rows, D_MODEL, dtype=torch.bfloat16, device=device)
    for transposing in (ops.quantise_both, ops.quantise_transposed):
        with pytest.raises(ValueError, match=f"{rows} rows: a transposed copy holds pairs"):
            transposing(x, slot(device))


def test_an_odd_context_is_refused_though_its_rows_are_even(device, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "SEQ", 47)
    monkeypatch.setitem(globals(), "ROWS", 2 * 47)
    with pytest.raises(ValueError, match="context of 47 tokens"):
        norm_rotate_backward(operations(emulate=False), "random", device)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_programs_share_the_heads_of_a_token(heads, device, monkeypatch) -> None:
    """Three heads, in groups of one, of two and one, and all in one."""
    ops = operations(emulate=False)
    monkeypatch.setattr(ops, "HEADS_BACKWARD", ops.HEADS_BACKWARD._replace(columns=heads))
    test_kernel_agrees_with_reference(norm_rotate_backward, "random", device)


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_hold_the_same_bits(kind, device) -> None:
    ops = operations(emulate=False)
    pairs = [
        quantise_both(ops, kind, device).outputs,
        (quantise(ops, kind, device).outputs[0], quantise_transposed(ops, kind, device).outputs[0]),
        normed_in_both_layouts(ops, kind, device),
        rms_norm_backward(ops, kind, device).outputs[3:],
        swiglu_backward(ops, kind, device).outputs[:2],
        (swiglu(ops, kind, device).outputs[0], swiglu_backward(ops, kind, device).outputs[2]),
        norm_rotate_backward(ops, kind, device).outputs[:2],
        cross_entropy_quantised(ops, kind, device).outputs[2:],
    ]
    for position, (rows, transposed) in enumerate(pairs):
        assert torch.equal(rows.view(torch.uint8), transposed.view(torch.uint8).t()), position


WIDTHS = {  # heads, head_dim, d_ff, vocabulary
    "7M": (4, 64, 704, 8192),
    "48M": (9, 64, 1536, 8192),
    "125M": (12, 64, 2048, 50304),
    "1.5B": (16, 128, 5632, 50304),
}


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_agree_with_reference_at_real_widths(width, device, monkeypatch) -> None:
    heads, head_dim, d_ff, vocabulary = WIDTHS[width]
    sizes = {"SEQ": 1024, "HEADS": heads, "HEAD_DIM": head_dim, "D_MODEL": heads * head_dim, "ROWS": BATCH * 1024}
    for name, size in (sizes | {"D_FF": d_ff, "VOCABULARY": vocabulary}).items():
        monkeypatch.setitem(globals(), name, size)
    for case in CASES:
        test_kernel_agrees_with_reference(case, "random", device)
    test_both_layouts_hold_the_same_bits("random", device)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device) -> None:
    """The largest tensors of a step have more elements than a 32-bit offset reaches."""
    x = torch.zeros(2**17, 2**14 + 64, dtype=torch.bfloat16, device=device)
    x[-1, -1] = 3.0
    both, transposed = operations(emulate=False).quantise_both(x, slot(device))
    assert both[-1, -1].float() == transposed[-1, -1].float() == 48.0
    assert both[0, 0].float() == 0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantising_rounds_to_nearest_saturates_and_keeps_nan(dtype, device) -> None:
    limit = torch.finfo(dtype).max
    x = torch.tensor([[0.0, 1.0, -3.0, limit / 2, 3 * limit, -3 * limit, torch.inf, -torch.inf, torch.nan]])
    x = x.repeat(16, 1).to(device)
    for ops in (reference, operations(emulate=False)):
        s = slot(device, dtype, scale=1.0)
        got = ops.quantise(x, s)[0].float().cpu()
        nan = torch.nan
        torch.testing.assert_close(
            got, torch.tensor([0.0, 1.0, -3.0, limit / 2, limit, -limit, nan, nan, nan]), equal_nan=True
        )
        assert s.amax[0] == 3 * limit, "the largest finite magnitude, whatever else there is"


def test_current_scale_uses_the_format_without_saturating(device) -> None:
    x = values("outlier", ROWS, D_MODEL).to(device)
    s = slot(device, scale=1.0)
    ops = operations(emulate=False)
    ops.quantise(x, s)
    set_current_scale(s, FusedConfig(margin=0))
    quantised = ops.quantise(x, s).float()
    assert 224 < quantised.abs().max() <= 448
    assert s.scale[0] * s.scale[1] == 1


@pytest.mark.parametrize("amax", [1e-42, 1e-20, 0.9, 448.0, 3e38])
def test_scales_are_powers_of_two_that_fit_the_format(amax, device) -> None:
    s = slot(device, scale=1.0)
    s.amax[0] = amax
    set_current_scale(s, FusedConfig(margin=1))
    scale = float(s.scale[1])
    assert math.frexp(scale)[0] == 0.5, "a power of two"
    assert scale * amax <= 448 / 2
    assert scale == 2.0**100 or scale * amax > 448 / 4


def test_cross_entropy_is_torchs(device) -> None:
    logits, targets = logits_and_targets("random", device)
    wanted = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    for ops in (reference, operations(emulate=False)):
        torch.testing.assert_close(ops.cross_entropy(logits.clone(), targets, 0.0)[0], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ops.cross_entropy_alone(logits.clone(), targets), wanted, rtol=1e-5, atol=1e-5)
