"""Kernels are held against their references before a model is trained with them."""

from __future__ import annotations

import pytest
import torch

from fp8lab import precision
from fp8lab.config import ModelConfig
from fp8lab.training import session
from tests.rule_data import tiny_config

MODEL = ModelConfig(name="tiny", d_model=48, n_layers=1, n_heads=3, d_ff=112, vocab_size=304, seq_len=32)


@pytest.fixture
def check():
    """The module, which remembers no check of another test."""
    # Imports Triton, which the interpreter's switch must come before.
    from fp8lab.kernels import check

    checks = (check.check_blocks, check.check_head, check.check_loss)
    for function in checks:
        function.cache_clear()
    yield check
    for function in checks:
        function.cache_clear()


def test_right_kernels_pass(check, device, monkeypatch) -> None:
    if device.type == "cpu":
        # The interpreter takes half a minute for the tokens that a GPU is asked.
        monkeypatch.setattr(check, "SEQUENCES", 1)
    check.check_blocks(MODEL, device)
    check.check_head(MODEL, device)
    check.check_loss(MODEL, device)


def test_a_model_of_one_head_passes(check, device, monkeypatch) -> None:
    monkeypatch.setattr(check, "BLOCKS", (check.problems.norm_rotate, check.problems.norm_rotate_backward))
    check.check_blocks(MODEL.model_copy(update={"n_heads": 1, "d_model": 16}), device)


def swap_columns(outputs):
    """Every fourth column of the transposed copy from its neighbour: what Triton 3.6 makes of FP8 exchanged."""
    wrong = outputs[1].clone()
    wrong[:, 3::4] = outputs[1][:, 2::4]
    return (outputs[0], wrong, *outputs[2:])


@pytest.mark.parametrize("name", ["swiglu_backward", "quantise_both", "norm_rotate_backward"])
def test_a_kernel_that_is_compiled_wrongly_is_refused_by_name(check, device, monkeypatch, name: str) -> None:
    monkeypatch.setattr(check, "BLOCKS", (getattr(check.problems, name),))
    right = getattr(check.problems.triton_ops, name)
    monkeypatch.setattr(check.problems.triton_ops, name, lambda *arguments: swap_columns(right(*arguments)))
    with pytest.raises(check.WrongKernel, match=f"kernel {name} wrongly.*output 1: .*is off"):
        check.check_blocks(MODEL, device)


def test_an_amax_that_misses_some_of_the_tensor_is_seen(check, device, monkeypatch) -> None:
    right = check.problems.triton_ops.quantise

    def quantise(x, slot):
        out = right(x, slot)
        slot.amax.mul_(0.5)
        return out

    monkeypatch.setattr(check.problems.triton_ops, "quantise", quantise)
    with pytest.raises(check.WrongKernel, match=r"kernel quantise wrongly.*amax"):
        check.check_head(MODEL, device)


@pytest.mark.parametrize(
    ("value", "becomes"), [(torch.nan, 0.0), (torch.inf, 448.0), (448.0, 0.0)], ids=["nan", "infinity", "saturated"]
)
def test_numbers_at_the_edge_of_the_format_are_among_those_compared(check, device, monkeypatch, value, becomes) -> None:
    """Though they are one element in thousands."""
    right = check.problems.triton_ops.quantise

    def quantise(x, slot):
        out = right(x, slot).float()
        wrong = out.isnan() if value != 448.0 else out.abs() == 448.0
        return torch.where(wrong, becomes, out).to(slot.dtype)

    monkeypatch.setattr(check.problems.triton_ops, "quantise", quantise)
    with pytest.raises(check.WrongKernel, match="kernel quantise wrongly"):
        check.check_head(MODEL, device)


def test_a_wrong_softmax_is_seen_among_one_hot_entries_that_outweigh_it(check, device, monkeypatch) -> None:
    model = MODEL.model_copy(update={"vocab_size": 8192})
    right = check.problems.triton_ops.cross_entropy

    def cross_entropy(logits, targets, z_loss):
        entropy, lse, grad = right(logits, targets, z_loss)
        return entropy, lse, torch.where(grad < 0, grad, 2 * grad)

    monkeypatch.setattr(check.problems.triton_ops, "cross_entropy", cross_entropy)
    with pytest.raises(check.WrongKernel, match=r"kernel cross_entropy wrongly.*output 2: .*is off"):
        check.check_loss(model, device)


def test_one_wrong_tile_of_many_is_seen(check, device, monkeypatch) -> None:
    model = MODEL.model_copy(update={"d_ff": 2048})
    right = check.problems.triton_ops.swiglu

    def swiglu(gate_up, slot):
        out = right(gate_up, slot).float()
        out[-48:, -64:] = 0.0
        return out.to(slot.dtype)

    monkeypatch.setattr(check, "BLOCKS", (check.problems.swiglu,))
    monkeypatch.setattr(check.problems.triton_ops, "swiglu", swiglu)
    with pytest.raises(check.WrongKernel, match="kernel swiglu wrongly"):
        check.check_blocks(model, device)


def test_a_model_is_checked_once_a_process(check, device, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(check.problems, "disagreement", lambda name, _: calls.append(name))
    check.check_blocks(MODEL, device)
    once = len(calls)
    check.check_blocks(MODEL.model_copy(), device)
    assert len(calls) == once > 0


@pytest.mark.parametrize(
    ("recipe", "head", "checked"),
    [
        ("fused", "bf16", ["loss", "blocks"]),
        ("fused", "fp8", ["loss", "blocks", "head"]),
        ("tensorwise", "fp8", ["loss", "head"]),
        ("tensorwise", "bf16", ["loss"]),
        ("bf16", "bf16", ["loss"]),
    ],
)
def test_what_a_training_runs_on_is_what_is_checked(check, monkeypatch, recipe, head, checked) -> None:
    calls: list[str] = []
    monkeypatch.setattr(check, "check_blocks", lambda *_: calls.append("blocks"))
    monkeypatch.setattr(check, "check_head", lambda *_: calls.append("head"))
    monkeypatch.setattr(check, "check_loss", lambda *_: calls.append("loss"))
    precision.check_kernels(MODEL, recipe, head, torch.device("cpu"))
    assert calls == [], "emulated"
    monkeypatch.setattr(precision, "fp8_tensor_cores", lambda: True)
    precision.check_kernels(MODEL, recipe, head, torch.device("cuda"))
    assert calls == checked


@pytest.mark.parametrize(("recipe", "head"), [("fused", "bf16"), ("tensorwise", "fp8")])
def test_a_run_is_examined_before_there_is_memory_for_it_on_a_gpu_too(monkeypatch, recipe, head) -> None:
    """With tensor cores nothing is emulated, and what is examined lies on no device."""
    monkeypatch.setattr(precision, "fp8_tensor_cores", lambda: True)
    session.check_model(tiny_config(recipe=recipe, head=head))
