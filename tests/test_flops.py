"""FLOP conventions against counting what the model really multiplies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fp8lab.config import MODELS, ModelConfig, parameter_count
from fp8lab.flops import bf16_mfu, flops_per_token, flops_record, fp8_share, parameters
from fp8lab.model import GPT

models = st.builds(
    lambda layers, heads, head_dim, ff, vocab: ModelConfig(
        name="m",
        d_model=heads * head_dim,
        n_layers=layers,
        n_heads=heads,
        d_ff=ff,
        vocab_size=vocab,
        seq_len=8,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 40),
    st.integers(2, 50),
)


@settings(deadline=None, max_examples=25)
@given(models)
def test_parameters_are_those_of_the_built_model(config: ModelConfig) -> None:
    model = GPT(config)
    counts = parameters(config)
    assert counts.total == parameter_count(config) == sum(p.numel() for p in model.parameters())
    assert counts.non_embedding == counts.total - model.embedding.weight.numel()
    gains = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counts.matmul == counts.total - gains


@settings(deadline=None, max_examples=10)
@given(models)
def test_flops_are_what_a_training_step_multiplies(config: ModelConfig) -> None:
    model = GPT(config)
    tokens = torch.zeros(2, config.seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    linear = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    assert linear == pytest.approx(6 * parameters(config).matmul * tokens.numel(), rel=0.01)


def test_conventions_differ_by_attention_and_head() -> None:
    model = MODELS["125M"]
    flops = flops_per_token(model)
    attention = flops.per_token_matmul_attention - flops.per_token_matmul_attention_causal
    assert attention == 6 * 12 * 768 * 1024
    assert flops.per_token_6n == 6 * 123_588_864
    assert flops_record(model, 10)["total"] == 10 * flops.per_token_matmul_attention_causal


def test_utilisation_is_flops_over_the_bf16_peak() -> None:
    model = MODELS["1.5B"]
    at_peak = 989.4e12 / flops_per_token(model).per_token_matmul_attention_causal
    assert bf16_mfu(model, at_peak) == pytest.approx(1)
    assert bf16_mfu(model, at_peak, device_count=8) == pytest.approx(1 / 8)


def test_fp8_covers_what_each_recipe_converts() -> None:
    """Counted by GEMM: three a Linear, of two FLOPs a weight and token each."""
    narrow, wide = MODELS["7M"], MODELS["350M"]
    blocks = 1 - 8192 * 256 / 6_914_048
    assert fp8_share(narrow, "bf16", "bf16") == 0
    assert fp8_share(narrow, "tensorwise", "bf16") == fp8_share(narrow, "rowwise", "bf16") == pytest.approx(blocks)
    assert fp8_share(narrow, "rowwise_with_gw_hp", "bf16") == pytest.approx(2 / 3 * blocks)
    output = narrow.n_layers * 256 * 256 / 6_914_048
    assert fp8_share(narrow, "fused", "bf16") == pytest.approx(blocks - output / 3)
    assert fp8_share(wide, "fused", "bf16") == fp8_share(wide, "tensorwise", "bf16")
    assert fp8_share(wide, "fused", "fp8") == 1
    assert fp8_share(narrow, "bf16", "fp8") == pytest.approx(1 - blocks)
