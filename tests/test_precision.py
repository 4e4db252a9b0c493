"""The swap converts what was asked, reports the rest, and its GEMMs are FP8's."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from fp8lab.config import ModelConfig
from fp8lab.cpu import bf16_autocast
from fp8lab.errors import UserError
from fp8lab.loss import training_loss
from fp8lab.model import GPT
from fp8lab.precision import TORCHAO_RECIPES, conversion_table, convert


def tiny(d_model: int = 64, d_ff: int = 160) -> GPT:
    model = GPT(ModelConfig(name="tiny", d_model=d_model, n_layers=2, n_heads=2, d_ff=d_ff, vocab_size=256, seq_len=32))
    model.initialise(seed=1)
    return model


def loss(model: GPT) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(2))
    with bf16_autocast(torch.device("cpu")):
        return training_loss(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])[0]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_bf16_changes_nothing() -> None:
    plain, converted = tiny(), tiny()
    rows = convert(converted, "bf16", "bf16", ())
    assert {row["precision"] for row in rows} == {"bf16"}
    assert torch.equal(loss(plain), loss(converted))


@pytest.mark.parametrize("recipe", [*TORCHAO_RECIPES, "fused"])
@pytest.mark.parametrize("head", ["bf16", "fp8"])
def test_fp8_rounds_forward_and_backward_but_stays_close(recipe, head) -> None:
    plain, converted = tiny(), tiny()
    names = [name for name, _ in plain.named_parameters()]
    rows = convert(converted, recipe, head, ())
    assert sum(row["reason"].startswith("converted") for row in rows) == 8 + (head == "fp8")
    assert [name for name, _ in converted.named_parameters()] == names
    assert set(names) <= set(converted.state_dict())
    exact, rounded = gradients(plain), gradients(converted)
    assert rounded.keys() == set(names)
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - gradient).norm() / gradient.norm()
        # Three mantissa bits round by up to 1/16 an operand; nothing would be bit-equal if FP8 were really used.
        assert 0 < error < 0.3, (name, error)


def test_fp8_head_differs_from_bf16_head() -> None:
    bf16, fp8 = tiny(), tiny()
    convert(bf16, "tensorwise", "bf16", ())
    convert(fp8, "tensorwise", "fp8", ())
    assert not torch.equal(loss(bf16), loss(fp8))


def test_excluded_layers_stay_in_bf16_and_say_why() -> None:
    model = tiny()
    rows = {row["name"]: row for row in convert(model, "tensorwise", "bf16", ("blocks.0.*", "*.down"))}
    assert rows["blocks.0.attention.qkv"] == {
        "name": "blocks.0.attention.qkv",
        "shape": "192 x 64",
        "precision": "bf16",
        "reason": "excluded by 'blocks.0.*'",
    }
    assert rows["blocks.1.mlp.down"]["reason"] == "excluded by '*.down'"
    assert rows["blocks.1.mlp.gate_up"]["precision"] == "tensorwise"
    assert type(model.blocks[0].attention.qkv) is nn.Linear
    assert type(model.blocks[1].attention.qkv) is not nn.Linear


@settings(max_examples=20, deadline=None)
@given(d_model=st.sampled_from([32, 40, 48, 64]), d_ff=st.integers(16, 80))
def test_only_multiples_of_16_are_converted(d_model, d_ff) -> None:
    model = tiny(d_model, d_ff)
    try:
        rows = convert(model, "tensorwise", "bf16", ())
    except UserError:
        assert d_model % 16  # every Linear has d_model on one side
        return
    for row in rows[:-1]:
        out_features, in_features = map(int, row["shape"].split(" x "))
        fits = out_features % 16 == 0 and in_features % 16 == 0
        assert (row["precision"] == "tensorwise") == fits
        assert (row["reason"] == "shape not a multiple of 16") == (not fits)


@pytest.mark.parametrize(
    ("recipe", "head", "patterns", "message"),
    [
        ("tensorwise", "bf16", ("blocks.7.*",), "high_precision: 'blocks.7.*' matches no Linear"),
        ("tensorwise", "bf16", ("*",), "would convert no Linear"),
        ("fp4", "bf16", (), "accepted: bf16, tensorwise"),
    ],
)
def test_requests_that_would_do_something_else_are_refused(recipe, head, patterns, message) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        convert(tiny(), recipe, head, patterns)
    assert message in str(error.value)


def test_table_folds_equal_blocks_into_one_line() -> None:
    rows = convert(tiny(), "rowwise", "bf16", ("blocks.1.mlp.*",))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(conversion_table(rows))
    text = console.export_text()
    assert "blocks.*.attention.qkv" in text
    assert "0-1" in text
    assert "excluded by 'blocks.1.mlp.*'" in text
    assert "head: bf16" in text
