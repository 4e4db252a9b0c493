"""FP8 health: the statistics are those of the recipe's own rounding, and measuring changes nothing."""

from __future__ import annotations

import functools
import logging
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic

from fp8lab import records
from fp8lab.config import RECIPES
from fp8lab.cpu import bf16_autocast
from fp8lab.errors import UserError
from fp8lab.kernels import end_step, reference
from fp8lab.kernels.scaling import DTYPES, QUANTISE, Slot
from fp8lab.loss import training_loss
from fp8lab.model import GPT
from fp8lab.precision import TORCHAO_RECIPES, _torchao_config, convert
from fp8lab.training import health, signals, trainer
from fp8lab.training.health import (
    HealthProbe,
    Rounding,
    dynamic_rounding,
    kurtosis,
    losses,
    overflow_counts,
    rounding_sums,
)
from fp8lab.training.session import Session
from tests import rule_data
from tests.rule_data import tiny_config, tiny_model

seeds = st.integers(0, 2**31)


def statistics(x: Tensor, rounding: Rounding) -> list[float]:
    """Scale, underflow fraction, saturation fraction and SQNR in dB."""
    return losses(torch.stack(rounding_sums(x, rounding))).tolist()


def random_tensor(seed: int, magnitude: float, rows: int = 48, features: int = 32) -> Tensor:
    """Gaussian, each row of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator) * torch.logspace(-3, 0, rows)[:, None] * magnitude


@pytest.mark.parametrize("recipe", TORCHAO_RECIPES)
@pytest.mark.parametrize("tensor", health.TENSORS)
@given(seed=seeds, magnitude=st.sampled_from([1e-7, 1.0, 3e4]))
@settings(max_examples=5, deadline=None)
def test_rounding_is_torchaos(recipe, tensor, seed, magnitude) -> None:
    config = _torchao_config(recipe, emulate=True)
    cast = getattr(config, f"cast_config_{tensor}")
    dtype = cast.target_dtype or DTYPES["e5m2" if tensor == "grad_output" else "e4m3"]
    x = random_tensor(seed, magnitude)
    theirs = hp_tensor_to_float8_dynamic(
        x,
        dtype,
        None,
        scaling_granularity=cast.scaling_granularity,
        axiswise_dim=get_maybe_axiswise_dim(-1, cast.scaling_granularity),
        round_scales_to_power_of_2=config.round_scales_to_power_of_2,
    )
    rounding = dynamic_rounding(recipe, tensor, x)
    _, stored = rounding(x)
    assert rounding.dtype == dtype
    assert torch.equal(rounding.scale, theirs._scale)
    assert torch.equal(stored, theirs._data.float())
    assert statistics(x, rounding)[2] == 0


@pytest.mark.parametrize("form", DTYPES)
@given(seed=seeds, exponent=st.integers(-4, 20))
@settings(max_examples=10, deadline=None)
def test_rounding_is_that_of_the_fused_kernels(form, seed, exponent) -> None:
    x = random_tensor(seed, 1.0)
    slot = Slot(torch.tensor([2.0**-exponent, 2.0**exponent, 1, 1]), torch.zeros(4), DTYPES[form])
    _, stored = Rounding(slot.scale[QUANTISE], slot.dtype)(x)
    assert torch.equal(stored, reference.quantise(x, slot).float())


def test_sqnr_is_blind_to_an_outlier_and_underflow_is_not() -> None:
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(1))
    _, underflow, _, sqnr = statistics(x, dynamic_rounding("tensorwise", "input", x))
    assert float(sqnr) == pytest.approx(31.5, abs=0.2)
    assert float(underflow) < 2e-5
    x[0, 0] = 1000 * x.abs().max()
    rounding = dynamic_rounding("tensorwise", "input", x)
    _, with_outlier, saturation, sqnr = statistics(x.flatten()[None, 1:], rounding)
    assert float(sqnr) == pytest.approx(31.6, abs=0.2)
    assert 0.005 < float(with_outlier) < 0.01
    assert float(saturation) == 0


def test_five_bit_range_costs_a_mantissa_bit() -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    e4m3, e5m2 = (statistics(x, dynamic_rounding("tensorwise", tensor, x))[3] for tensor in ("input", "grad_output"))
    assert (e4m3, e5m2) == (pytest.approx(31.5, abs=0.2), pytest.approx(25.5, abs=0.2))


def test_flushed_and_clipped_values_are_counted() -> None:
    # E4M3: the smallest number is 2^-9, ties go to even (zero), the largest is 448, and 464 would round to a next.
    x = torch.tensor([[0.0, 2.0**-10, -(2.0**-12), 2.0**-9, 1.0, 448.0, 463.0, -465.0, 1e6]])
    scale, underflow, saturation, _ = statistics(x, Rounding(torch.ones(()), DTYPES["e4m3"]))
    assert (float(scale), float(underflow), float(saturation)) == (1.0, pytest.approx(2 / 8), pytest.approx(2 / 9))


@given(seed=seeds, magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 1e8]))
@settings(max_examples=10, deadline=None)
def test_sqnr_does_not_depend_on_the_tensors_unit(seed, magnitude) -> None:
    x = random_tensor(seed, 1.0)
    for recipe in TORCHAO_RECIPES:
        one, other = (
            statistics(y, dynamic_rounding(recipe, "grad_output", y))[3]
            for y in (x, x * 2.0 ** round(np.log2(magnitude)))
        )
        assert one == pytest.approx(other, abs=1e-3)


@given(seed=seeds, degrees=st.integers(5, 100))
@settings(max_examples=10, deadline=None)
def test_kurtosis_is_pearsons(seed, degrees) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_t(degrees, (64, 32))).float()
    assert float(kurtosis(x)) == pytest.approx(stats.kurtosis(x.numpy(), axis=None, fisher=False), rel=1e-3)


def plain_twin(model: GPT) -> GPT:
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def prepared(recipe: str, **changes) -> tuple[GPT, HealthProbe]:
    """A converted model and its probe."""
    config = tiny_config(recipe=recipe, model=tiny_model(seq_len=32), **changes)
    model = GPT(config.model)
    model.initialise(1)
    twin = plain_twin(model)
    conversion = convert(model, config.recipe, config.head, config.high_precision, emulate=True)
    return model, HealthProbe(config, model, twin, conversion)


def batch_of(rows: int) -> Tensor:
    return torch.from_numpy(rule_data.sequences(7, rows, 33))


def backward(model: GPT, batch: Tensor, micro_batch: int) -> Tensor:
    """The gradients of one step, as the trainer accumulates them; returns their norms."""
    for tokens in batch.split(micro_batch):
        with bf16_autocast(torch.device("cpu")):
            objective, _ = training_loss(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])
        (objective / (len(batch) / micro_batch)).backward()
    return torch.stack([parameter.grad.norm() for parameter in model.parameters()])


def rows_of(probe: HealthProbe, values: Tensor) -> dict[tuple[str, str], dict[str, float]]:
    return {
        row: dict(zip(health.VALUES, value.tolist(), strict=True))
        for row, value in zip(probe.rows, values, strict=True)
    }


def test_the_probe_sees_the_steps_own_tensors() -> None:
    model, probe = prepared("bf16", micro_batch=4, global_batch_tokens=8 * 32)
    batch = batch_of(8)
    seen: dict[tuple[str, str], list[float]] = {}

    def watch(name: str):
        def hook(_module, inputs, output):
            # The probe looks at a quarter of the first micro-batch: its first sequence.
            seen.setdefault((name, "input"), []).append(float(inputs[0][0].detach().abs().max()))
            output.register_hook(
                lambda grad: seen.setdefault((name, "grad_output"), []).append(float(grad[0].abs().max()))
            )

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    norms = backward(model, batch, 4)
    for handle in hooks:
        handle.remove()
    measured = rows_of(probe, probe.measure(batch, norms))
    assert {name for name, _ in measured} == set(linears)
    for (name, tensor), (first, _) in seen.items():
        assert measured[name, tensor]["amax"] == pytest.approx(first, rel=0.02), (name, tensor)
    for name, linear in linears.items():
        assert measured[name, "weight"]["amax"] == float(linear.weight.detach().abs().max())
        assert measured[name, "weight"]["gradient_norm"] == pytest.approx(float(linear.weight.grad.norm()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_measuring_leaves_no_trace(recipe) -> None:
    model, probe = prepared(recipe)
    batch = batch_of(4)
    norms = backward(model, batch, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    probe.measure(batch, norms)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)


def test_fused_tensors_are_rounded_by_their_own_scales() -> None:
    model, probe = prepared("fused")
    batch = batch_of(4)
    norms = backward(model, batch, 4)
    scales = model.fp8_state.scale[:, QUANTISE].reshape(len(model.blocks), 3, 4)
    for (name, tensor), row in rows_of(probe, probe.measure(batch, norms)).items():
        _, block, kind = name.split(".", 2)
        position = ["attention.qkv", "attention.output", "mlp.gate_up", "mlp.down"].index(kind)
        assert row["scale"] == float(scales[int(block), ["weight", "input", "grad_output"].index(tensor), position])
        # Calibrated on the whole batch, with a margin of one bit: what a part of it has fits, and is not tiny.
        assert 448 / 64 < row["amax"] * row["scale"] <= 448
        assert row["saturation_fraction"] == 0
        assert row["sqnr_db"] == pytest.approx(31.5, abs=2)


def test_values_that_a_run_does_not_round_are_absent() -> None:
    _, bf16 = prepared("bf16")
    _, partly = prepared("tensorwise", high_precision=("blocks.1.*",))
    rounded = ("scale", "underflow_fraction", "saturation_fraction", "sqnr_db")
    norms = torch.ones(19)
    for probe, converted in ((bf16, ()), (partly, ("blocks.0.",))):
        for (name, tensor), row in rows_of(probe, probe.measure(batch_of(4), norms)).items():
            assert row["amax"] > 0
            assert all(np.isfinite(row[key]) == name.startswith(tuple(converted)) for key in rounded)
            assert np.isfinite(row["kurtosis"]) == (tensor == "input")
            assert np.isfinite(row["gradient_norm"]) == (tensor == "weight")


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"health_layers: '\*\.up' matches no Linear; names are blocks\.0\.attention\.qkv"
    ):
        prepared("bf16", health_layers=("*.down", "*.up"))
    _, probe = prepared("bf16", health_layers=("*.down", "blocks.1.*"))
    assert {name for name, _ in probe.rows} == {
        "blocks.0.mlp.down",
        *(f"blocks.1.{kind}" for kind in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")),
    }


def test_a_tensor_that_leaves_its_range_is_counted_under_its_name() -> None:
    model, _ = prepared("fused")
    batch = batch_of(4)
    backward(model, batch, 4)
    end_step(model, torch.tensor(False))
    assert overflow_counts(model) == ({}, {})
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.mul_(1000)
        model.blocks[0].attention.output.weight.mul_(1e-6)
    backward(model, batch, 4)
    end_step(model, torch.tensor(False))
    counts = overflow_counts(model)
    assert counts.saturated["blocks.1.mlp.down weight"] == 1
    assert counts.underflowing["blocks.0.attention.output weight"] == 1
    assert not [name for name in counts.saturated if name.endswith("weight") and "1.mlp.down" not in name]
    assert overflow_counts(prepared("tensorwise")[0]) is None


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)

    def run(run: str, **changes):
        folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
        return trainer.train(tiny_config(run=run, **changes), **folders)

    return run


def table_of(root: Path, run: str) -> pd.DataFrame:
    return records.read_table(root / "records_dir" / "test" / run, "health")


def weights_of(root: Path, run: str) -> bytes:
    return (root / "checkpoints_dir" / "test" / run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_measured_is_the_run_that_is_not(train, tmp_path, recipe) -> None:
    measured = train("measured", recipe=recipe, health_interval=3)
    alone = train("alone", recipe=recipe, health_interval=0)
    assert weights_of(tmp_path, "measured") == weights_of(tmp_path, "alone")
    assert measured.final == alone.final
    assert not (tmp_path / "records_dir" / "test" / "alone" / "health.parquet").exists()
    table = table_of(tmp_path, "measured")
    assert table["step"].unique().tolist() == [3, 6, 9, 12, 15, 18]
    assert len(table) == 6 * 8 * 3
    assert not table.duplicated(["step", "layer", "tensor"]).any()
    assert np.isfinite(table["amax"]).all()
    rounded = table[["scale", "underflow_fraction", "saturation_fraction", "sqnr_db"]]
    assert rounded.isna().all(axis=None) if recipe == "bf16" else rounded.notna().all(axis=None)
    if recipe == "fused":
        assert measured.stability.saturated_steps.keys() <= {f"{row.layer} {row.tensor}" for row in table.itertuples()}
    else:
        assert measured.stability.saturated_steps is None


@pytest.mark.parametrize("recipe", ["bf16", "fused"])
def test_an_interrupted_run_has_every_row_once(train, tmp_path, monkeypatch, recipe) -> None:
    changes = {"recipe": recipe, "health_interval": 3, "health_layers": ("*.down",)}
    train("whole", **changes)
    real = Session.take_step

    def take_step(self, batch):
        real(self, batch)
        if self.step in (7, 12) and self.step > self.resumed_at:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "take_step", take_step)
        for step in (7, 12):
            with pytest.raises(signals.Interrupted):
                train("parts", **changes)
            assert table_of(tmp_path, "parts")["step"].max() == step // 3 * 3
    train("parts", **changes)
    pd.testing.assert_frame_equal(table_of(tmp_path, "parts"), table_of(tmp_path, "whole"), check_exact=True)


def test_a_resumed_run_may_measure_other_layers(train, tmp_path) -> None:
    train("run", tokens=10 * 128, health_interval=5, health_layers=("*.down",))
    config = {"tokens": 10 * 128, "health_interval": 2, "health_layers": ("*.qkv",)}
    train("run", **config)
    assert set(table_of(tmp_path, "run")["layer"]) == {"blocks.0.mlp.down", "blocks.1.mlp.down"}


def test_compiled_blocks_are_not_compiled_again(train, tmp_path, monkeypatch) -> None:
    real = Session.take_step

    def take_step(self, batch):
        with torch.compiler.set_stance("default" if self.step == 0 else "fail_on_recompile"):
            real(self, batch)

    monkeypatch.setattr(Session, "take_step", take_step)
    # What is compiled again is decided before code is generated, which for these blocks takes a minute.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="aot_eager"))
    changes = {"recipe": "tensorwise", "compile": True, "tokens": 6 * 128, "model": tiny_model(n_layers=1)}
    for interval in (0, 2):
        train(f"every-{interval}", health_interval=interval, **changes)
    assert weights_of(tmp_path, "every-0") == weights_of(tmp_path, "every-2")
    assert table_of(tmp_path, "every-2")["step"].unique().tolist() == [2, 4, 6]


def test_without_memory_for_a_probe_the_run_goes_on_and_says_so(train, tmp_path, monkeypatch, caplog) -> None:
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(health, "training_loss", no_memory)
        assert train("run", health_interval=10).status == "finished"
    assert {record.message for record in caplog.records} == {
        "no memory for a health probe of run: this step is not measured"
    }
    assert not (tmp_path / "records_dir" / "test" / "run" / "health.parquet").exists()
