"""Calls of every kernel at a model's shapes, and whether a kernel computes what its reference does.

The benchmark times them (`fp8lab.kernels.benchmark`), and before a model is trained they are held against
their references (`fp8lab.kernels.check`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8lab.config import LADDER_VOCAB, ModelConfig
from fp8lab.kernels import reference, triton_ops
from fp8lab.kernels.scaling import Slot

HEAD_ROWS = 16_384
"""Rows of logits a chunk of the head."""
EPSILON = 1e-6
PATCH = 64
"""Rows and columns of the patches of an output that are judged one by one: no larger than a kernel's tile."""
TOLERATED_SHARE = 0.01
"""Of a patch's elements that may differ: sums in another order cross a rounding boundary here and there."""
Z_LOSS = 1e-4


class Problem:
    """Random tensors of one model's shapes."""

    def __init__(
        self, model: ModelConfig, sequences: int, seq: int, device: torch.device, *, seed: int = 1, nasty: bool = False
    ) -> None:
        """
        Args:
            nasty: with a NaN, an infinity and a number that saturates in every BF16 tensor.
        """
        self.model, self.rows, self.sequences, self.seq, self.device = model, sequences * seq, sequences, seq, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self._nasty = nasty

    def slot(self, dtype: torch.dtype = torch.float8_e4m3fn, scale: float = 64.0) -> Slot:
        return Slot(
            torch.tensor([1 / scale, scale, 0, 0], device=self.device), torch.zeros(4, device=self.device), dtype
        )

    def bf16(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)
        if self._nasty:
            for part, value in enumerate((torch.nan, torch.inf, 3e4)):
                x.view(-1)[x.numel() * part // 3 + 7] = value
        return x

    def fp32(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) + 0.5


Call = tuple[str, list[Any]]
"""Name of an operation, and its arguments."""
MakeCall = Callable[[Problem], Call]


def quantise(p: Problem) -> Call:
    return "quantise", [p.bf16(p.rows, p.model.d_model), p.slot()]


def quantise_both(p: Problem) -> Call:
    return "quantise_both", [p.bf16(p.rows, p.model.d_model), p.slot()]


def quantise_weight(p: Problem) -> Call:
    return "quantise_both", [p.fp32(2 * p.model.d_ff, p.model.d_model), p.slot()]


def quantise_embedding(p: Problem) -> Call:
    """The tied head's weight."""
    return "quantise_both", [p.fp32(p.model.vocab_size, p.model.d_model), p.slot()]


def quantise_transposed(p: Problem) -> Call:
    return "quantise_transposed", [p.bf16(p.rows, p.model.d_model), p.slot()]


def rms_norm(p: Problem) -> Call:
    d = p.model.d_model
    return "rms_norm", [p.bf16(p.rows, d), p.bf16(p.rows, d), p.fp32(d), EPSILON, p.slot()]


def rms_norm_alone(p: Problem) -> Call:
    d = p.model.d_model
    return "rms_norm", [p.bf16(p.rows, d), None, p.fp32(d), EPSILON, p.slot()]


def rms_norm_backward(p: Problem) -> Call:
    return _rms_norm_backward(p, p.slot(scale=16.0), transposed=True)


def rms_norm_backward_rows_alone(p: Problem) -> Call:
    """Where the weight gradient below stays in BF16."""
    return _rms_norm_backward(p, p.slot(scale=16.0), transposed=False)


def rms_norm_backward_of_the_first_block(p: Problem) -> Call:
    return _rms_norm_backward(p, None, transposed=False)


def _rms_norm_backward(p: Problem, grad_slot: Slot | None, *, transposed: bool) -> Call:
    d = p.model.d_model
    x = p.bf16(p.rows, d)
    rstd = torch.rsqrt(x.float().square().mean(-1) + EPSILON)
    arguments = [p.bf16(p.rows, d), x, rstd, p.fp32(d), p.fp32(p.rows), p.bf16(p.rows, d)]
    return "rms_norm_backward", [*arguments, p.slot(), grad_slot, transposed]


def swiglu(p: Problem) -> Call:
    return "swiglu", [p.bf16(p.rows, 2 * p.model.d_ff), p.slot()]


def swiglu_backward(p: Problem) -> Call:
    slots = [p.slot(), p.slot(scale=16.0)]
    return "swiglu_backward", [p.bf16(p.rows, 2 * p.model.d_ff), p.bf16(p.rows, p.model.d_ff), *slots]


def _angles(p: Problem) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(p.seq).float(), torch.linspace(1, 0.01, p.model.head_dim // 2)).to(p.device)
    return angle.cos(), angle.sin()


def norm_rotate(p: Problem) -> Call:
    qkv, dim = p.bf16(p.rows, 3 * p.model.d_model), p.model.head_dim
    return "norm_rotate", [qkv, p.fp32(dim), p.fp32(dim), *_angles(p), p.model.n_heads, EPSILON]


def norm_rotate_backward(p: Problem) -> Call:
    shape, dim = (p.sequences, p.seq, p.model.n_heads, p.model.head_dim), p.model.head_dim
    grads = tuple(p.bf16(*shape).transpose(1, 2) for _ in range(3))
    qkv = p.bf16(p.rows, 3 * p.model.d_model)
    return "norm_rotate_backward", [qkv, grads, p.fp32(dim), p.fp32(dim), *_angles(p), EPSILON, p.slot()]


def _logits(p: Problem) -> tuple[Tensor, Tensor]:
    rows, vocabulary = min(p.rows, HEAD_ROWS), p.model.vocab_size
    return p.bf16(rows, vocabulary), torch.randint(vocabulary, (rows,), generator=p.generator, device=p.device)


def cross_entropy(p: Problem) -> Call:
    return "cross_entropy", [*_logits(p), Z_LOSS]


def cross_entropy_short(p: Problem) -> Call:
    vocabulary = LADDER_VOCAB
    targets = torch.randint(vocabulary, (HEAD_ROWS,), generator=p.generator, device=p.device)
    return "cross_entropy", [p.bf16(HEAD_ROWS, vocabulary), targets, Z_LOSS]


def cross_entropy_alone(p: Problem) -> Call:
    return "cross_entropy_alone", [*_logits(p)]


def cross_entropy_quantised(p: Problem) -> Call:
    return "cross_entropy_quantised", [*_logits(p), Z_LOSS, p.slot(torch.float8_e5m2, 2.0**15)]


def outputs(result: Any) -> tuple[Any, ...]:
    """What an operation returns, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def disagreement(name: str, arguments: list[Any]) -> str | None:
    """What is wrong with the kernel's result, None if it is the reference's."""
    for_reference, for_kernel = _copies(arguments), _copies(arguments)
    expected = outputs(getattr(reference, name)(*for_reference))
    actual = outputs(getattr(triton_ops, name)(*for_kernel))
    for position, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        if got is None and wanted is None:
            continue
        wrong = "missing" if got is None or wanted is None else _difference(got, wanted)
        if wrong is not None:
            return f"output {position}: {wrong}"
    for got, wanted in zip(for_kernel, for_reference, strict=True):
        # Of a tensor that is rounded to BF16 first, a neighbour.
        if isinstance(got, Slot) and not torch.allclose(got.amax, wanted.amax, rtol=2**-7):
            return f"amax {got.amax[0]:.6g}, should be {wanted.amax[0]:.6g}"
    return None


def _difference(got: Tensor, wanted: Tensor) -> str | None:
    """What is wrong with an output, None if it is the reference's but for rounding."""
    values, right = got.float(), wanted.float()
    finite = right.isfinite()
    # An infinity in one and a NaN in the other depends on the order of a sum: that neither is a number does not.
    if not torch.equal(values.isfinite(), finite):
        return "not finite in other places"
    typical = right[finite].square().mean().sqrt()
    if got.dtype.itemsize == 1:
        off = values != right
        saturated = right.abs() == torch.finfo(got.dtype).max
        if off[saturated].float().mean() > 0.5:
            return "what saturates is off"
    else:
        relative, absolute = (2**-6, 1e-4) if got.dtype == torch.bfloat16 else (2**-10, 1e-3)
        off = (values - right).abs() > relative * right.abs() + absolute * typical
    plane = (off & finite).float().reshape(1, -1, off.shape[-1])
    patch = (min(PATCH, plane.shape[1]), min(PATCH, plane.shape[2]))
    share = float(F.avg_pool2d(plane, patch, ceil_mode=True).max())
    return f"{share:.1%} of a part of it is off" if share > TOLERATED_SHARE else None


def _copies(arguments: list[Any]) -> list[Any]:
    """Arguments whose logits may be overwritten, and whose amax is fresh."""
    return [
        argument.clone()
        if isinstance(argument, Tensor)
        else argument._replace(amax=torch.zeros_like(argument.amax))
        if isinstance(argument, Slot)
        else argument
        for argument in arguments
    ]
