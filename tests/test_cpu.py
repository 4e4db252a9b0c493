"""BF16 products on a CPU are what tensor cores compute: exact products, an FP32 sum, one rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab import cpu
from fp8lab.cpu import bf16_autocast

SIZES = st.integers(0, 33)


@pytest.fixture(autouse=True, scope="module")
def _widened():
    """Whatever this processor has; afterwards too, as torch has no way back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "multiplies_bf16", lambda: False)
        bf16_autocast(torch.device("cpu"))


@settings(max_examples=50, deadline=None)
@given(rows=SIZES, inner=SIZES, columns=SIZES, seed=st.integers(0, 99), transposed=st.booleans())
def test_a_product_is_rounded_once(rows, inner, columns, seed, transposed) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator).bfloat16()
    right = torch.randn(inner, columns, generator=generator).bfloat16()
    if transposed:
        right = right.t().contiguous().t()
    exact = left.double() @ right.double()
    found = left @ right
    assert found.dtype is torch.bfloat16
    # Half a unit in the last of eight bits, and what FP32's sum adds to it.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_other_dtypes_are_multiplied_as_ever(dtype) -> None:
    left, right = torch.arange(6).view(2, 3).to(dtype), torch.arange(12).view(3, 4).to(dtype)
    expected = torch.tensor([[20, 23, 26, 29], [56, 68, 80, 92]], dtype=dtype)
    torch.testing.assert_close(left @ right, expected)


def test_infinities_and_nan_stay() -> None:
    left = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [3e38, 3e38]]).bfloat16()
    found = left @ torch.tensor([[2.0], [1.0]]).bfloat16()
    assert found[0] == torch.inf
    assert found[1].isnan()
    assert found[2] == torch.inf


def test_a_linear_s_gradients_are_those_of_bf16_operands() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, 24, generator=generator, requires_grad=True)
    weight = torch.randn(16, 24, generator=generator, requires_grad=True)
    with bf16_autocast(x.device):
        output = F.linear(x, weight)
    gradient = torch.randn(output.shape, generator=generator).bfloat16()
    output.backward(gradient)
    assert output.dtype is torch.bfloat16
    rows, upstream = x.detach().bfloat16().flatten(0, 1).double(), gradient.flatten(0, 1).double()
    torch.testing.assert_close(weight.grad.double(), upstream.t() @ rows, rtol=2**-7, atol=1e-4)
    expected = (upstream @ weight.detach().bfloat16().double()).view_as(x)
    torch.testing.assert_close(x.grad.double(), expected, rtol=2**-7, atol=1e-4)


def test_attention_s_gradients_are_those_of_fp32_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v, gradient = (torch.randn(2, 3, 40, 16, generator=generator).bfloat16() for _ in range(4))
    found, exact = [], []
    for dtype, gradients in ((torch.bfloat16, found), (torch.float64, exact)):
        operands = [operand.detach().to(dtype).requires_grad_() for operand in (q, k, v)]
        F.scaled_dot_product_attention(*operands, is_causal=True).backward(gradient.to(dtype))
        gradients += [operand.grad for operand in operands]
    assert all(part.dtype is torch.bfloat16 for part in found)
    for part, expected in zip(found, exact, strict=True):
        # The output that backward reads was rounded to BF16.
        torch.testing.assert_close(part.double(), expected, rtol=2**-6, atol=0.02)
