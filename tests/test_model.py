"""The model is causal, relative in position, and of the size that the configuration says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab.config import MODELS, ModelConfig, parameter_count
from fp8lab.cpu import bf16_autocast
from fp8lab.model import GPT, apply_rope, rope_frequencies
from tests.rule_data import tiny_model


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(tiny_model())
    model.initialise(seed=3)
    return model


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16]),
    n_layers=st.integers(1, 3),
    d_ff=st.sampled_from([24, 64]),
)
def test_parameters_are_counted_as_the_model_has_them(heads, head_dim, n_layers, d_ff) -> None:
    config = ModelConfig(
        name="any", d_model=heads * head_dim, n_layers=n_layers, n_heads=heads, d_ff=d_ff, vocab_size=64, seq_len=16
    )
    assert sum(parameter.numel() for parameter in GPT(config).parameters()) == parameter_count(config)


@settings(max_examples=20, deadline=None)
@given(position=st.integers(1, 31), replacement=st.integers(0, 255))
def test_a_token_changes_nothing_before_it(model, position, replacement) -> None:
    tokens = torch.arange(32)[None] * 7 % 256
    changed = tokens.clone()
    changed[0, position] = replacement
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :position], after[0, :position])
    if replacement != tokens[0, position]:
        assert not torch.equal(before[0, position:], after[0, position:])


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(0, 40), distance=st.integers(0, 20))
def test_rope_scores_depend_on_distance_alone(shift, distance) -> None:
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, 16, generator=generator)
    cos, sin = rope_frequencies(64, 16, 10_000.0)
    queries, keys = (apply_rope(vector.expand(1, 64, 1, 16), cos, sin)[0, :, 0] for vector in (query, key))
    assert torch.allclose(queries[distance] @ keys[0], queries[shift + distance] @ keys[shift], atol=1e-4)


def test_a_seed_means_the_same_weights_and_another_seed_others() -> None:
    models = [GPT(tiny_model()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialise(seed)
    first, same, other = (model.embedding.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("d_model", [32, 128])
def test_initial_loss_is_near_uniform_and_residual_projections_start_smaller(d_model) -> None:
    model = GPT(tiny_model(d_model=d_model, n_layers=4))
    model.initialise(seed=1)
    tokens = torch.randint(0, 256, (8, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) - math.log(272)) < 0.5
    block = model.blocks[0]
    expected = math.sqrt(2 / (5 * d_model))
    assert block.attention.qkv.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert block.mlp.down.weight.std().item() == pytest.approx(expected / math.sqrt(8), rel=0.1)


def test_bf16_autocast_keeps_the_residual_stream_in_bf16() -> None:
    model = GPT(tiny_model())
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad(), bf16_autocast(torch.device("cpu")):
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert seen == [torch.bfloat16]


def test_named_models_have_the_sizes_they_are_named_for() -> None:
    for name, config in MODELS.items():
        named = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        assert abs(parameter_count(config) / named - 1) < 0.1, name
