"""A fused block trains as the BF16 block does, keeps its parameters, and moves its histories once a step."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fp8lab.config import FusedConfig, ModelConfig
from fp8lab.cpu import bf16_autocast
from fp8lab.errors import UserError
from fp8lab.kernels import convert_blocks, end_step, linear_cross_entropy, reference
from fp8lab.kernels.block import SLOTS
from fp8lab.model import GPT

CONFIG = ModelConfig(name="tiny", d_model=64, n_layers=2, n_heads=2, d_ff=160, vocab_size=256, seq_len=32)


def model(*, fused: bool, settings: FusedConfig | None = None, device: str = "cpu") -> GPT:
    gpt = GPT(CONFIG)
    gpt.initialise(seed=1)
    gpt.to(device)
    if fused:
        convert_blocks(gpt, emulate=device == "cpu", settings=settings)
    return gpt


TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


def batch(seed: int = 2) -> Tensor:
    return torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(seed))


def loss(gpt: GPT, tokens: Tensor) -> Tensor:
    tokens = tokens.to(gpt.embedding.weight.device)
    with bf16_autocast(tokens.device):
        hidden = gpt.hidden(tokens[:, :-1]).flatten(0, 1)
        return linear_cross_entropy(hidden, gpt.embedding.weight, tokens[:, 1:].flatten(), fp8=False)[0]


def gradients(gpt: GPT, tokens: Tensor) -> dict[str, Tensor]:
    gpt.zero_grad()
    loss(gpt, tokens).backward()
    return {name: parameter.grad for name, parameter in gpt.named_parameters() if parameter.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "settings",
    [
        FusedConfig(),
        FusedConfig(gradient_format="e5m2", recompute_rotated_from=0),
        FusedConfig(bf16_output_gradient_below=0, power_of_two_scales=False),
    ],
)
def test_gradients_are_those_of_bf16_within_fp8_rounding(settings) -> None:
    exact = gradients(model(fused=False), batch())
    rounded = gradients(model(fused=True, settings=settings), batch())
    assert rounded.keys() == exact.keys()
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        # E4M3 rounds each operand by 3% on average, E5M2 by 6%; gradients pass through several GEMMs.
        assert 0.005 < relative_error(rounded[name], gradient) < 0.3, name


GEMMS_A_BLOCK = {"output": 4, "grad_input": 4, "grad_weight": 3}
"""In FP8 at this width, where the output projection's weight gradient stays in BF16."""


@pytest.mark.parametrize("fast", [(), ("output",), ("grad_input",), ("grad_weight",), tuple(GEMMS_A_BLOCK)])
def test_the_gemms_that_are_asked_for_accumulate_fast(fast, monkeypatch) -> None:
    real, counted = reference.matmul, Counter()

    def matmul(a, b, a_slot, b_slot, dtype, fast):
        counted[fast] += 1
        return real(a, b, a_slot, b_slot, dtype, fast)

    monkeypatch.setattr(reference, "matmul", matmul)
    gradients(model(fused=True, settings=FusedConfig(fast_accumulation=fast)), batch())
    expected = CONFIG.n_layers * sum(GEMMS_A_BLOCK[gemm] for gemm in fast)
    assert (counted[True], counted[True] + counted[False]) == (expected, CONFIG.n_layers * sum(GEMMS_A_BLOCK.values()))


def test_without_rounding_the_block_is_the_bf16_block(monkeypatch) -> None:
    """The wiring by hand is exact: what separates a fused block from a BF16 one is FP8's rounding alone."""
    monkeypatch.setattr(reference, "_round", lambda value, slot: (value.float() * slot.scale[1]).bfloat16())
    monkeypatch.setattr(reference, "_transposed", lambda matrix: matrix.t().contiguous())
    exact = gradients(model(fused=False), batch())
    for settings in (FusedConfig(), FusedConfig(bf16_output_gradient_below=0, recompute_rotated_from=0)):
        for name, gradient in gradients(model(fused=True, settings=settings), batch()).items():
            assert relative_error(gradient, exact[name]) < 0.03, name


def test_parameters_keep_their_names_and_identity() -> None:
    gpt = model(fused=False)
    before = dict(gpt.named_parameters())
    names = list(gpt.state_dict())
    convert_blocks(gpt, emulate=True)
    assert dict(gpt.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in gpt.named_parameters())
    assert [name for name in gpt.state_dict() if not name.startswith("fp8_state.")] == names


def train(gpt: GPT, steps: int, *, first: int = 0, micro_steps: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for _ in range(micro_steps):
            value = loss(gpt, batch(seed=step % 4))
            (value / micro_steps).backward()
        optimizer.step()
        end_step(gpt, TAKEN)
        losses.append(value.item())
    return losses


def test_training_follows_bf16() -> None:
    exact, fused = train(model(fused=False), 30), train(model(fused=True), 30)
    assert exact[-1] < 0.8 * exact[0], "the task is learnable"
    assert fused[0] == pytest.approx(exact[0], abs=0.05), "the first step is calibrated"
    assert fused[-1] == pytest.approx(exact[-1], abs=0.15)


def test_first_step_is_scaled_by_its_own_tensors() -> None:
    gpt = model(fused=True)
    loss(gpt, batch()).backward()
    scaled = gpt.fp8_state.amax[:, 0] * gpt.fp8_state.scale[:, 1]
    limit = gpt.fp8_state.limit
    # Powers of two, and one of margin: between a quarter and a half of the format.
    assert ((scaled > limit / 4) & (scaled <= limit / 2)).all()


def test_histories_move_once_a_step_whatever_the_micro_steps() -> None:
    gpt = model(fused=True)
    state = gpt.fp8_state
    train(gpt, 1, micro_steps=3)
    assert int(state.steps) == 1
    assert (state.history > 0).sum(0).tolist() == [1] * (CONFIG.n_layers * len(SLOTS))
    assert (state.amax == 0).all()


def test_recomputation_changes_neither_gradients_nor_histories() -> None:
    plain, recomputed = model(fused=True), model(fused=True)
    for gpt in (plain, recomputed):
        train(gpt, 2)
    for block in recomputed.blocks:
        original = block.forward
        block.forward = lambda *inputs, original=original: checkpoint(original, *inputs, use_reentrant=False)
    expected, actual = gradients(plain, batch()), gradients(recomputed, batch())
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    assert torch.equal(plain.fp8_state.amax, recomputed.fp8_state.amax)


def test_a_skipped_step_leaves_no_trace_however_large_its_gradients() -> None:
    gpt = model(fused=True)
    train(gpt, 3)
    before, expected = copy.deepcopy(gpt.fp8_state.state_dict()), gradients(gpt, batch())
    gpt.zero_grad()
    (1e30 * loss(gpt, batch(seed=9))).backward()
    assert gpt.fp8_state.amax[:, 0].isfinite().all()
    assert gpt.fp8_state.amax[:, 0].max() > 1e20
    end_step(gpt, SKIPPED)
    after = gpt.fp8_state.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "amax")
    assert (after["amax"] == 0).all()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(gpt, batch()).items())


def test_after_a_skipped_first_step_the_next_is_calibrated() -> None:
    fresh, begun = model(fused=True), model(fused=True)
    (1e30 * loss(begun, batch(seed=9))).backward()
    end_step(begun, SKIPPED)
    assert train(begun, 3) == train(fresh, 3)
    assert torch.equal(begun.fp8_state.history, fresh.fp8_state.history)


def test_scales_follow_the_largest_amax_of_any_rank() -> None:
    scales = []
    for largest_of_ranks in (None, lambda amax: amax.mul_(2.0**10)):
        gpt = model(fused=True)
        loss(gpt, batch()).backward()
        end_step(gpt, TAKEN, largest_of_ranks)
        scales.append(gpt.fp8_state.scale[:, 1])
    assert torch.equal(scales[1], scales[0] * 2.0**-10)


def test_evaluation_leaves_no_trace() -> None:
    gpt = model(fused=True)
    for _ in range(2):
        before = copy.deepcopy(gpt.fp8_state.state_dict())
        with torch.no_grad():
            assert loss(gpt, batch(seed=9)).isfinite()
        after = gpt.fp8_state.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        train(gpt, 1)


def test_evaluation_between_steps_leaves_later_steps_as_they_were() -> None:
    plain, evaluated = model(fused=True), model(fused=True)
    for step in range(4):
        with torch.no_grad():
            loss(evaluated, batch(seed=9))
        assert train(evaluated, 1, first=step) == train(plain, 1, first=step)
    assert plain.fp8_state.history.amax(0).gt(0).all()
    assert torch.equal(evaluated.fp8_state.history, plain.fp8_state.history)


def test_evaluation_before_the_first_step_changes_nothing() -> None:
    plain, evaluated = model(fused=True), model(fused=True)
    with torch.no_grad():
        loss(evaluated, batch(seed=9))
    assert train(evaluated, 2) == train(plain, 2)


def test_a_resumed_run_continues_exactly() -> None:
    straight = model(fused=True)
    optimizer = torch.optim.SGD(straight.parameters(), lr=0.1)

    def step(gpt: GPT, optimizer: torch.optim.Optimizer, seed: int) -> float:
        optimizer.zero_grad()
        value = loss(gpt, batch(seed))
        value.backward()
        optimizer.step()
        end_step(gpt, TAKEN)
        return value.item()

    for seed in range(3):
        step(straight, optimizer, seed)
    resumed = model(fused=True)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    other = torch.optim.SGD(resumed.parameters(), lr=0.1)
    assert [step(resumed, other, seed) for seed in (3, 4)] == [step(straight, optimizer, seed) for seed in (3, 4)]
    assert torch.equal(resumed.fp8_state.history, straight.fp8_state.history)


def test_weights_are_cast_again_after_they_change() -> None:
    gpt = model(fused=True)
    first = loss(gpt, batch()).item()
    with torch.no_grad():
        gpt.blocks[0].mlp.down.weight.mul_(-3.0)
    assert loss(gpt, batch()).item() != first


@pytest.mark.parametrize("name", ["blocks.0.attention.qkv.weight", "blocks.1.mlp.down.weight", "embedding.weight"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_loss(name, bad) -> None:
    gpt = model(fused=True)
    train(gpt, 1)
    with torch.no_grad():
        gpt.get_parameter(name).view(-1)[:512] = bad
    assert not loss(gpt, batch()).isfinite()


def test_saturation_and_underflow_are_counted() -> None:
    gpt = model(fused=True)
    train(gpt, 1)
    state = gpt.fp8_state
    assert state.saturated_steps.sum() == 0
    state.scale[0, 1] *= 16  # the amax now exceeds the format
    state.scale[1, 1] *= 2.0**-30  # and this tensor vanishes
    loss(gpt, batch()).backward()
    end_step(gpt, TAKEN)
    assert state.saturated_steps.tolist()[:2] == [1, 0]
    assert state.underflowing_steps.tolist()[:2] == [0, 1]


def test_part_of_a_block_cannot_stay_in_bf16() -> None:
    whole = [f"blocks.0.{name}" for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")]
    gpt = model(fused=False)
    convert_blocks(gpt, emulate=True, high_precision=whole)
    assert [type(block).__name__ for block in gpt.blocks] == ["Block", "FusedBlock"]
    with pytest.raises(UserError, match=r"block 1 only blocks\.1\.mlp\.down"):
        convert_blocks(model(fused=False), emulate=True, high_precision=["blocks.1.mlp.down"])


@pytest.mark.gpu
def test_compiled_kernels_agree_with_emulation() -> None:
    emulated, real = gradients(model(fused=True), batch()), gradients(model(fused=True, device="cuda"), batch())
    for name, gradient in emulated.items():
        # Sums in another order cross rounding boundaries here and there, and a boundary is 1/16 wide: a norm's gain,
        # whose gradient is a sum of such terms over all tokens, is off by 0.10 with either processor in the right.
        assert relative_error(real[name].cpu(), gradient) < 0.15, name


def test_a_block_takes_over_the_gradient_that_the_block_above_quantised(monkeypatch) -> None:
    """The same bits as by a kernel of its own, and no such kernel runs for the blocks below the last."""
    calls = []
    quantise_both = reference.quantise_both
    monkeypatch.setattr(reference, "quantise_both", lambda x, slot: calls.append(x.shape) or quantise_both(x, slot))
    stacked, apart = model(fused=True), model(fused=True)
    apart.blocks[1]._below = ()
    counts = []
    for gpt in (stacked, apart):
        train(gpt, 2)
        calls.clear()
        counts.append((gradients(gpt, batch()), calls.count((64, CONFIG.d_model))))
    (expected, alone), (actual, both) = counts[1], counts[0]
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    assert torch.equal(stacked.fp8_state.amax, apart.fp8_state.amax)
    assert both == alone - 1


def test_a_gradient_changed_on_its_way_down_is_quantised_again() -> None:
    plain, scaled = model(fused=True), model(fused=True)
    for gpt in (plain, scaled):
        train(gpt, 1)
    scaled.blocks[0].register_full_backward_pre_hook(lambda _, grads: (2 * grads[0],))
    one, two = gradients(plain, batch()), gradients(scaled, batch())
    name = "blocks.0.mlp.down.weight"
    assert torch.allclose(two[name], 2 * one[name], rtol=0.05, atol=1e-6)
