"""Kernels are held against their references before a model is trained with them."""

from __future__ import annotations

import pytest

from fp8lab.config import ModelConfig
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.precision import convert

MODEL = ModelConfig(name="tiny", d_model=48, n_layers=1, n_heads=3, d_ff=112, vocab_size=304, seq_len=32)


@pytest.fixture
def problems():
    """The module, which remembers no check of another test."""
    # Imports Triton, which the interpreter's switch must come before.
    from fp8lab.kernels import problems

    problems.check_kernels.cache_clear()
    yield problems
    problems.check_kernels.cache_clear()


def test_right_kernels_pass(problems, device) -> None:
    convert(GPT(MODEL).to(device), "fused", "fp8", emulate=False)


def swap_columns(outputs):
    """Every fourth column of the transposed copies from its neighbour: what Triton 3.6 makes of FP8 exchanged."""
    wrong = outputs[1].clone()
    wrong[:, 3::4] = outputs[1][:, 2::4]
    return (outputs[0], wrong, *outputs[2:])


@pytest.mark.parametrize(
    ("name", "recipe", "head"),
    [("swiglu_backward", "fused", "bf16"), ("quantise_both", "fused", "bf16"), ("quantise_both", "tensorwise", "fp8")],
)
def test_a_kernel_that_is_compiled_wrongly_is_refused_by_name(
    problems, device, monkeypatch, name: str, recipe, head
) -> None:
    right = getattr(problems.triton_ops, name)
    monkeypatch.setattr(problems.triton_ops, name, lambda *arguments: swap_columns(right(*arguments)))
    with pytest.raises(UserError, match=f"kernel {name} wrongly.*output 1 differs"):
        convert(GPT(MODEL).to(device), recipe, head, emulate=False)


def test_an_amax_that_misses_some_of_the_tensor_is_seen(problems, device, monkeypatch) -> None:
    right = problems.triton_ops.quantise

    def quantise(x, slot):
        out = right(x, slot)
        slot.amax.mul_(0.5)
        return out

    monkeypatch.setattr(problems.triton_ops, "quantise", quantise)
    with pytest.raises(UserError, match=r"kernel quantise wrongly.*amax"):
        convert(GPT(MODEL).to(device), "fused", emulate=False)


def test_emulation_needs_no_kernels(problems, device, monkeypatch) -> None:
    monkeypatch.setattr(problems, "disagreement", lambda *_: "it was called")
    convert(GPT(MODEL).to(device), "fused", "fp8", emulate=True)
    convert(GPT(MODEL).to(device), "bf16", emulate=False)
