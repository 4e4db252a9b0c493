"""What a run does and leaves behind, on tokens made by a rule."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from fp8lab import records, spikes
from fp8lab.config import RECIPES, parameter_count
from fp8lab.errors import OutOfMemory, UserError
from fp8lab.generation import generate
from fp8lab.model import GPT
from fp8lab.plan import load_plan
from fp8lab.progress import read_progress
from fp8lab.training import checkpoint, compilation, guard, metrics, session, trainer, validation
from fp8lab.training.checkpoint import load_model
from fp8lab.training.divergence import Diverged
from fp8lab.training.signals import Interrupted
from tests import rule_data
from tests.checkpoints import load_latest, replace_file
from tests.rule_data import tiny_config, tiny_model


@pytest.fixture(autouse=True)
def rule(monkeypatch) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)


@pytest.fixture
def train(tmp_path):
    def run(config=None, **options):
        config = config or tiny_config()
        folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
        return trainer.train(config, **folders | options)

    return run


def curve(root: Path, run: str = "tiny") -> pd.DataFrame:
    table = records.read_table(root / "records_dir" / "test" / run, "metrics")
    return table[["step", "tokens", "loss", "lr", "grad_norm", "skipped"]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_the_rule(train, tmp_path, recipe) -> None:
    record = train(tiny_config(recipe=recipe, tokens=120 * 128))
    assert record.final.validation_loss < math.log(256) - 2.5
    assert record.emulated == (recipe != "bf16")
    converted = [row for row in record.conversion if row["precision"] != "bf16"]
    assert len(converted) == (0 if recipe == "bf16" else 8)


def test_record_is_complete_and_reads_back(train, tmp_path) -> None:
    config = tiny_config(validation_interval=8)
    returned = train(config)
    folder = tmp_path / "records_dir" / "test" / "tiny"
    record = records.read(folder)
    assert record == returned
    assert (record.status, record.reason, record.steps, record.tokens) == ("finished", None, 20, 2560)
    assert record.config == config.model_dump(mode="json")
    assert record.provenance.data_sha256 == rule_data.RuleDataset.sha256
    assert record.provenance.epochs == {"odd": 2560 / 2e6, "even": 2560 / 2e6}
    assert record.flops.total == record.flops.per_token_matmul_attention_causal * 2560
    assert len(record.samples) == 2
    metrics = records.read_table(folder, "metrics")
    assert metrics["step"].tolist() == list(range(1, 21))
    assert record.final.train_loss == pytest.approx(metrics["loss"].mean())
    validation = records.read_table(folder, "validation")
    assert validation["step"].tolist() == [8, 8, 16, 16, 20, 20]
    last = validation.tail(2).set_index("domain")
    assert record.final.validation_loss == pytest.approx(0.75 * last.loss["odd"] + 0.25 * last.loss["even"])
    # A token of the rule is a byte.
    assert last.bits_per_byte["odd"] == pytest.approx(last.loss["odd"] / math.log(2))
    progress = read_progress(tmp_path / "checkpoints_dir" / "test" / "tiny" / "progress.json")
    assert (progress.stage, progress.step, progress.steps) == ("done", 20, 20)


def test_trained_weights_load_and_write_text(train, tmp_path) -> None:
    record = train(tiny_config(recipe="tensorwise", head="fp8"))
    model, config = load_model(tmp_path / "checkpoints_dir" / "test" / "tiny")
    assert config.recipe == "tensorwise"
    encoding = rule_data.RuleDataset().encoding
    texts = [generate(model, encoding, "abc", max_tokens=8, seed=seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    greedy = [generate(model, encoding, "abc", max_tokens=8, temperature=0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert record.samples[0]


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(train, tmp_path) -> None:
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_config(run=run, seed=seed))
    first, same, other = (curve(tmp_path, run) for run in "abc")
    pd.testing.assert_frame_equal(first, same, check_exact=True)
    assert not first["loss"].equals(other["loss"])


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "fused"])
def test_gradient_accumulation_gives_the_large_batch_s_numbers(train, tmp_path, recipe) -> None:
    for micro_batch in (1, 2, 4):
        train(tiny_config(run=f"micro{micro_batch}", micro_batch=micro_batch, recipe=recipe, tokens=8 * 128))
    whole = curve(tmp_path, "micro4")
    for micro_batch in (1, 2):
        parts = curve(tmp_path, f"micro{micro_batch}")
        # BF16 and FP8 round sums of different lengths differently; a wrong factor would be off by 2 or 4.
        tolerance = 0.005 if recipe == "bf16" else 0.08
        assert parts["loss"].to_numpy() == pytest.approx(whole["loss"].to_numpy(), abs=tolerance)
        assert parts["grad_norm"].to_numpy() == pytest.approx(whole["grad_norm"].to_numpy(), rel=0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputing_activations_changes_no_number(train, tmp_path, recipe) -> None:
    for recompute in (False, True):
        train(tiny_config(run=str(recompute), recipe=recipe, activation_checkpointing=recompute, tokens=6 * 128))
    pd.testing.assert_frame_equal(curve(tmp_path, "False"), curve(tmp_path, "True"), check_exact=True)


def test_recomputing_keeps_fewer_activations() -> None:
    saved = {}
    for recompute in (False, True):
        model = GPT(tiny_model(n_layers=4))
        model.checkpoint_activations = recompute
        sizes = saved[recompute] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            model.hidden(torch.zeros(4, 32, dtype=torch.int64))
    assert sum(saved[True]) < sum(saved[False]) / 4


def test_weight_decay_shrinks_matrices_alone() -> None:
    model = GPT(tiny_model())
    model.initialise(1)
    config = tiny_config(optimizer={"peak_learning_rate": 0.1, "weight_decay": 0.5})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = session.make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_clipping_limits_the_gradient_that_the_optimizer_sees(train, tmp_path) -> None:
    clip = 0.1
    train(tiny_config(tokens=128, optimizer={"peak_learning_rate": 1e-2, "gradient_clip": clip}))
    assert curve(tmp_path)["grad_norm"][0] > clip
    state = load_latest(tmp_path / "checkpoints_dir" / "test" / "tiny")
    moments = [tensor for name, tensor in state.optimizer.items() if name.endswith(".exp_avg")]
    # After one step the first moment is (1 - beta1) times the clipped gradient.
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in moments))
    assert norm == pytest.approx(0.1 * clip, rel=1e-4)


def poison(monkeypatch, steps: set[int], factor: float = math.nan) -> None:
    """Make the loss of these steps not a number, or `factor` times what it is."""
    real, calls = session.training_loss, []

    def poisoned(*arguments):
        calls.append(1)
        objective, loss = real(*arguments)
        return (objective * factor, loss * factor) if len(calls) in steps else (objective, loss)

    monkeypatch.setattr(session, "training_loss", poisoned)


def amplify(monkeypatch, step: int) -> None:
    """Make this step's gradients a thousand times as large."""
    real, calls = session.training_loss, []

    def amplified(*arguments):
        calls.append(1)
        objective, loss = real(*arguments)
        return objective * (1000 if len(calls) == step else 1), loss

    monkeypatch.setattr(session, "training_loss", amplified)


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "fused"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(train, tmp_path, monkeypatch, recipe, fault_report) -> None:
    poison(monkeypatch, {5, 9})
    record = train(tiny_config(recipe=recipe))
    assert record.status == "finished"
    assert (record.stability.skipped_steps, record.stability.first_bad_step) == (2, 5)
    table = curve(tmp_path)
    assert table[table["skipped"]]["step"].tolist() == [5, 9]
    assert table[~table["skipped"]]["loss"].notna().all()
    state = load_latest(tmp_path / "checkpoints_dir" / "test" / "tiny")
    assert {float(tensor) for name, tensor in state.optimizer.items() if name.endswith(".step")} == {18.0}
    fault_report(
        "non-finite",
        "The loss or a gradient of a step is not finite",
        "The step changes nothing but the count and the log, and training goes on",
        recipe=recipe,
        steps=record.steps,
        skipped_steps=record.stability.skipped_steps,
        first_bad_step=record.stability.first_bad_step,
    )


def test_a_skipped_step_moves_no_scale_of_fused_even_where_its_gradients_are_finite(
    train, tmp_path, monkeypatch
) -> None:
    real, calls, factor = session.training_loss, [], {"nan": math.nan, "huge": 1e30}

    def poisoned(*arguments):
        calls.append(1)
        objective, loss = real(*arguments)
        return objective * factor[run] if len(calls) == 5 else objective, loss

    monkeypatch.setattr(session, "training_loss", poisoned)
    for run in factor:
        calls.clear()
        record = train(tiny_config(run=run, recipe="fused", tokens=10 * 128))
        assert record.stability.skipped_steps == 1
        assert record.stability.underflowing_steps == {}
    curves = [curve(tmp_path, run).drop(columns="grad_norm") for run in factor]
    pd.testing.assert_frame_equal(*curves, check_exact=True)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_skipped_losses_are_no_part_of_the_final_one(train, tmp_path, monkeypatch, factor) -> None:
    poison(monkeypatch, {15, 18}, factor)
    record = train()
    assert records.read(tmp_path / "records_dir" / "test" / "tiny") == record
    table = curve(tmp_path)
    taken = table[~table["step"].isin([15, 18])]
    assert record.final.train_loss == pytest.approx(taken["loss"].mean())


def test_a_skipped_outlier_is_no_part_of_the_final_loss(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(guard, "OUTLIER_WINDOW", 8)
    poison(monkeypatch, {15}, 1e6)
    record = train(tiny_config(optimizer={"peak_learning_rate": 1e-3, "skip_outliers": 8}))
    assert record.stability.skipped_steps == 1
    assert record.final.train_loss < 10


def test_a_run_that_took_no_step_has_no_training_loss(train, tmp_path, monkeypatch) -> None:
    poison(monkeypatch, {1, 2})
    record = train(tiny_config(tokens=2 * 128))
    assert (record.status, record.final.train_loss) == ("finished", None)
    assert records.read(tmp_path / "records_dir" / "test" / "tiny") == record


@pytest.mark.parametrize("compact", [False, True])
def test_weights_without_a_finite_validation_loss_are_a_divergence(train, tmp_path, monkeypatch, compact) -> None:
    monkeypatch.setattr(validation, "total_nats", lambda *_: torch.tensor(math.inf))
    with pytest.raises(Diverged, match="the validation loss of odd after the last step is inf"):
        train(tiny_config(compact=compact))
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    assert (record.status, record.steps, record.final) == ("diverged", 20, None)
    assert len(curve(tmp_path)) == 20


def test_averaged_weights_without_a_finite_validation_loss_are_left_out(train, tmp_path, monkeypatch, caplog) -> None:
    infinite = records.DomainLoss(loss=math.inf, bits_per_byte=math.inf)
    monkeypatch.setattr(session.Session, "validate_average", lambda _: {"odd": infinite, "even": infinite})
    record = train(tiny_config(average_half_life=0.1))
    assert (record.status, record.final.averaged) == ("finished", None)
    assert records.read(tmp_path / "records_dir" / "test" / "tiny") == record
    assert "the averaged weights of tiny have no finite validation loss" in caplog.text


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reading values, or asking how many satisfy something."""

    METHODS = ("tolist", "numpy", "cpu", "__array__")
    """What a CPU's tensors do without an operator; the rest goes through one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> HostReads:
        for name in self.METHODS:
            self._patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._patch.undo()

    def _counted(self, method):
        def counted(tensor, *arguments, **keywords):
            self.found.append(method.__name__)
            return method(tensor, *arguments, **keywords)

        return counted

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        aten = torch.ops.aten
        if function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
            self.found.append(str(function))
        if function is aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in arguments[1]):
            self.found.append(str(function))
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_whatever_reads_a_value_is_counted(read) -> None:
    with HostReads() as counted:
        torch.where(torch.ones(3) > 0, 1.0, 2.0).sum()
        assert counted.found == []
        read(torch.ones(3))
    assert counted.found


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "fused"])
def test_skipping_never_makes_the_host_wait(train, monkeypatch, recipe, fault_report) -> None:
    poison(monkeypatch, {4})
    real, reads = session.Session.take_step, {}

    def take_step(self, batch):
        with HostReads() as counted:
            real(self, batch)
        reads[self.step] = counted.found

    monkeypatch.setattr(session.Session, "take_step", take_step)
    optimizer = {"peak_learning_rate": 1e-3, "skip_outliers": 8}
    record = train(tiny_config(recipe=recipe, tokens=8 * 128, optimizer=optimizer))
    assert record.stability.skipped_steps == 1
    # The first step of `fused` asks once whether it has a history.
    assert {step: found for step, found in reads.items() if found and step > 1} == {}
    fault_report(
        "non-finite",
        "The verdict on a step, taken or skipped, outliers judged too",
        "It stays on the device: no step reads a value back",
        recipe=recipe,
        values_read_by_the_host=sum(len(found) for step, found in reads.items() if step > 1),
    )


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_a_run_that_stays_non_finite_stops_as_diverged_and_names_the_layer(
    train, tmp_path, monkeypatch, recipe, fault_report
) -> None:
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    real, seen = session.convert, []

    def convert(model, *arguments, **options):
        def break_down(_module, _inputs, output):
            seen.append(1)
            return output if len(seen) < 14 else output * math.nan

        model.blocks[0].mlp.register_forward_hook(break_down)
        return real(model, *arguments, **options)

    monkeypatch.setattr(session, "convert", convert)
    with pytest.raises(Diverged, match=r"the first of them step 14: .*, in blocks\.0\.mlp$"):
        train(tiny_config(recipe=recipe, tokens=200 * 128))
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    assert record.status == "diverged"
    assert record.stability.first_bad_step == 14
    assert record.stability.first_bad_layer == "blocks.0.mlp"
    state = load_latest(tmp_path / "checkpoints_dir" / "test" / "tiny")
    assert state.step in (20, 30)
    assert all(torch.isfinite(tensor).all() for tensor in state.model.values())
    fault_report(
        "non-finite",
        "Every step from one on is not finite",
        "The run stops as `diverged`; its record names the first bad step and layer, and the last checkpoint holds the "
        "last good weights",
        recipe=recipe,
        first_bad_step=record.stability.first_bad_step,
        first_bad_layer=record.stability.first_bad_layer,
        stopped_after_step=record.steps,
        skipped_steps=record.stability.skipped_steps,
    )


def arrive_late(monkeypatch) -> None:
    """Let numbers come to the host as a GPU's do: what one flush asks for, the next one has."""
    real = metrics.Arrivals.flush

    def flush(self, *, wait):
        if wait:
            return real(self, wait=True)
        arrived, pending = self._collect(), self._pending
        if pending:
            self._arriving = ([entry for entry, _ in pending], torch.stack([values for _, values in pending]), None)
            self._pending = []
        return arrived

    monkeypatch.setattr(metrics.Arrivals, "flush", flush)


def test_a_diverged_run_s_table_goes_on_to_its_last_step(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    arrive_late(monkeypatch)
    poison(monkeypatch, set(range(7, 1000)))
    with pytest.raises(Diverged):
        train(tiny_config(tokens=100 * 128))
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    table = curve(tmp_path)
    assert table["step"].tolist() == list(range(1, record.steps + 1))
    assert table["skipped"].sum() == record.stability.skipped_steps


def test_a_divergence_is_told_from_a_bad_step_long_before_it(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    real, calls = session.training_loss, []

    def break_down(model, hidden, targets, z_loss):
        calls.append(1)
        if len(calls) == 2:
            hidden = hidden * math.nan
        if len(calls) == 6:
            model.blocks[1].mlp.down.weight.data.fill_(math.nan)
        return real(model, hidden, targets, z_loss)

    monkeypatch.setattr(session, "training_loss", break_down)
    message = r"of them step 7: .*, in blocks\.1\.mlp\.down; the first of the run .* was step 2, in the forward pass$"
    with pytest.raises(Diverged, match=message):
        train(tiny_config(tokens=100 * 128))
    stability = records.read(tmp_path / "records_dir" / "test" / "tiny").stability
    assert (stability.first_bad_step, stability.first_bad_layer) == (2, "the forward pass")


def test_outlier_steps_are_skipped_when_asked(train, monkeypatch, fault_report) -> None:
    real, calls = session.training_loss, []

    def spike(*arguments):
        calls.append(1)
        objective, loss = real(*arguments)
        return objective, loss + (100 if len(calls) == 150 else 0)

    monkeypatch.setattr(session, "training_loss", spike)
    optimizer = {"peak_learning_rate": 1e-3, "skip_outliers": 8}
    record = train(tiny_config(tokens=160 * 128, log_interval=20, optimizer=optimizer))
    assert record.stability.skipped_steps == 1
    assert record.stability.first_bad_step is None
    # Every step after the first 100 is judged, logged or not.
    assert record.stability.judged_steps == 60
    assert record.stability.spike_score == pytest.approx(1 / 60)
    assert record.stability.first_spike_step == 150
    fault_report(
        "non-finite",
        "A loss far above the last 128 steps', with `skip_outliers`",
        "The step is skipped and counted; the spike score in the record shows it",
        recipe="bf16",
        skipped_steps=record.stability.skipped_steps,
        spike_score=round(record.stability.spike_score, 4),
    )


def test_an_exception_leaves_a_failed_record_with_the_reason(train, tmp_path, monkeypatch) -> None:
    real = rule_data.RuleLoader.batch

    def batch(self, step, *rank):
        if step >= 6:
            raise OSError("the disk\nwent away")
        return real(self, step, *rank)

    monkeypatch.setattr(rule_data.RuleLoader, "batch", batch)
    with pytest.raises(OSError, match="went away"):
        train()
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    assert (record.status, record.reason) == ("failed", "OSError: the disk went away")
    assert not (tmp_path / "checkpoints_dir" / "test" / "tiny" / "model.safetensors").exists()


class DeadDevice:
    """What is left of a guard whose device is lost."""

    def __getattr__(self, name):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_device_that_dies_leaves_a_failed_record_with_the_reason(train, tmp_path, monkeypatch) -> None:
    real = session.Session.take_step

    def take_step(self, batch):
        if self.step == 5:
            self.guard = DeadDevice()
        real(self, batch)

    monkeypatch.setattr(session.Session, "take_step", take_step)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train()
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    assert (record.status, record.steps) == ("failed", 5)
    assert record.reason == "RuntimeError: CUDA error: device-side assert triggered"


def test_a_failure_is_recorded_before_a_device_is_asked_that_never_answers(train, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "records_dir" / "test" / "tiny"
    seen = []

    class SilentDevice:
        def __getattr__(self, name):
            # Here the process would wait for ever, until it is killed.
            seen.append((records.read(folder).status, records.read(folder).reason, len(curve(tmp_path))))
            raise RuntimeError("killed")

    real = session.Session.take_step

    def take_step(self, batch):
        if self.step == 5:
            self.flush(wait=True)
            self.guard = SilentDevice()
            raise RuntimeError("Connection closed by peer")
        real(self, batch)

    monkeypatch.setattr(session.Session, "take_step", take_step)
    with pytest.raises(RuntimeError, match="closed by peer"):
        train()
    assert set(seen) == {("failed", "RuntimeError: Connection closed by peer", 5)}
    assert records.read(folder).steps == 5


def slow_write(monkeypatch, error: OSError | None = None) -> None:
    """Make every checkpoint take a while to write, then fail with `error` if there is one."""
    real = checkpoint.write

    def write(*arguments):
        time.sleep(0.2)
        if error is not None:
            raise error
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "write", write)


def fail_after(monkeypatch, step: int) -> None:
    """Make the batch after `step` unreadable."""
    real = rule_data.RuleLoader.batch

    def batch(self, number, *rank):
        if number >= step:
            raise ValueError("no such batch")
        return real(self, number, *rank)

    monkeypatch.setattr(rule_data.RuleLoader, "batch", batch)


def test_a_run_is_over_when_its_last_checkpoint_is_written(train, tmp_path, monkeypatch) -> None:
    slow_write(monkeypatch)
    work = tmp_path / "checkpoints_dir" / "test"
    train(tiny_config(run="compact", tokens=5 * 128, checkpoint_interval=4, compact=True))
    assert not list((work / "compact").glob("*step-*"))
    fail_after(monkeypatch, 4)
    with pytest.raises(ValueError, match="no such batch"):
        train(tiny_config(run="failed", checkpoint_interval=4))
    assert [path.name for path in (work / "failed").glob("*step-*")] == ["step-00000004"]


def test_a_checkpoint_that_cannot_be_written_is_told(train, tmp_path, monkeypatch, caplog) -> None:
    slow_write(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(run="compact", tokens=5 * 128, checkpoint_interval=4, compact=True))
    record = records.read(tmp_path / "records_dir" / "test" / "compact")
    assert (record.status, record.reason) == ("failed", "OSError: [Errno 28] No space left on device")
    fail_after(monkeypatch, 4)
    with pytest.raises(ValueError, match="no such batch"):
        train(tiny_config(run="failed", checkpoint_interval=4))
    assert "ValueError" in records.read(tmp_path / "records_dir" / "test" / "failed").reason
    assert "last checkpoint could not be written: OSError: [Errno 28] No space left" in caplog.text


def wait_for_checkpoints(monkeypatch) -> None:
    """Let each step end with no write under way."""
    real = trainer.Training._stop_if_asked

    def stop_if_asked(self, received):
        if self.writer._thread is not None:
            self.writer._thread.join()
        real(self, received)

    monkeypatch.setattr(trainer.Training, "_stop_if_asked", stop_if_asked)


def test_a_failed_checkpoint_is_made_up_for_within_a_flush(train, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    wait_for_checkpoints(monkeypatch)
    real, written = checkpoint.write, []

    def write(folder, state, *world):
        written.append(state.step)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, state, *world)

    monkeypatch.setattr(checkpoint, "write", write)
    assert train(tiny_config(tokens=20 * 128, checkpoint_interval=4)).status == "finished"
    assert written[0] == 4
    assert written[1] in (5, 6)
    assert written[-1] == 20
    assert "a checkpoint could not be written: [Errno 28] No space left" in caplog.text


def test_a_disk_that_stays_full_fails_the_run_long_before_the_next_checkpoint(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    wait_for_checkpoints(monkeypatch)
    slow_write(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(tokens=100 * 128, checkpoint_interval=40))
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    assert (record.status, record.reason) == ("failed", "OSError: [Errno 28] No space left on device")
    assert record.steps <= 42


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal while a step's batch is being loaded."""
    real = session.Session.take_step

    def take_step(self, batch):
        real(self, batch)
        if self.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(session.Session, "take_step", take_step)


def test_averaged_weights_are_validated_beside_the_weights_and_change_nothing(train, tmp_path) -> None:
    plain = train(tiny_config(run="plain")).final
    # At a half-life of a hundredth of the last step the average is the weights.
    short = train(tiny_config(run="short", average_half_life=0.0005)).final
    long = train(tiny_config(run="long", average_half_life=0.5)).final
    assert plain.averaged is None
    assert short.averaged.by_domain == short.by_domain == plain.by_domain
    assert short.averaged.validation_loss == plain.validation_loss
    assert long.validation_loss == plain.validation_loss
    # While the loss still falls fast, an average of the whole way lags behind.
    assert plain.validation_loss + 0.1 < long.averaged.validation_loss < math.log(256)


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "fused"])
def test_a_run_continued_after_a_signal_is_the_uninterrupted_run(train, tmp_path, monkeypatch, recipe) -> None:
    monkeypatch.setattr(spikes, "SPIKE_MIN_HISTORY", 4)
    whole = train(tiny_config(run="whole", recipe=recipe, average_half_life=0.1))
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            train(tiny_config(run="parts", recipe=recipe, average_half_life=0.1))
    assert stopped.value.exit_code == 143
    record = records.read(tmp_path / "records_dir" / "test" / "parts")
    assert (record.status, record.steps) == ("interrupted", 7)
    assert "SIGTERM after step 7" in record.reason
    parts = train(tiny_config(run="parts", recipe=recipe, average_half_life=0.1))
    assert parts.status == "finished"
    assert parts.final == whole.final
    assert parts.stability == whole.stability
    assert parts.stability.judged_steps == 16
    pd.testing.assert_frame_equal(curve(tmp_path, "whole"), curve(tmp_path, "parts"), check_exact=True)
    weights = [
        (tmp_path / "checkpoints_dir" / "test" / run / "model.safetensors").read_bytes() for run in ("whole", "parts")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("step", [8, 16, 20])
def test_a_stop_at_a_validation_loses_no_validation_and_makes_none_twice(train, tmp_path, monkeypatch, step) -> None:
    config = {"validation_interval": 8, "tokens": 20 * 128}
    train(tiny_config(run="whole", **config))
    with monkeypatch.context() as patch:
        stop_at(patch, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(tiny_config(run="parts", **config))
    train(tiny_config(run="parts", **config))
    whole, parts = (
        records.read_table(tmp_path / "records_dir" / "test" / run, "validation") for run in ("whole", "parts")
    )
    assert whole["step"].tolist() == [8, 8, 16, 16, 20, 20]
    pd.testing.assert_frame_equal(whole, parts, check_exact=True)


@contextlib.contextmanager
def raising(number: int) -> Iterator[None]:
    """Let a signal that nobody collects fail the test instead of ending the tests."""

    def fail(*_) -> None:
        raise AssertionError(f"{signal.Signals(number).name} was not collected")

    before = signal.signal(number, fail)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_finishes_lets_it_finish(train, tmp_path, monkeypatch, number, compact) -> None:
    real = session.Session.validate_average

    def validate_average(self):
        signal.raise_signal(number)
        return real(self)

    monkeypatch.setattr(session.Session, "validate_average", validate_average)
    with raising(number):
        record = train(tiny_config(tokens=128, compact=compact, average_half_life=0.1))
    assert record.status == "finished"
    assert record.final.averaged is not None
    assert records.read(tmp_path / "records_dir" / "test" / "tiny") == record


WSD = {"kind": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.25, "final_fraction": 0.0}


def test_a_decay_branch_equals_the_run_of_that_length_and_costs_only_its_decay(train, tmp_path) -> None:
    # 40 steps: warm-up to 4, stable to 30, decay. The branch decays over steps 15 to 20.
    train(tiny_config(run="long", tokens=40 * 128, schedule=WSD, keep_checkpoints_at=(5, 15)))
    branch = tiny_config(run="branch", schedule=WSD, parent={"run": "long", "step": 15}, validation_interval=5)
    record = train(branch)
    # The parent's last step is the parent's to validate.
    validation = records.read_table(tmp_path / "records_dir" / "test" / "branch", "validation")
    assert validation["step"].tolist() == [20, 20]
    assert (record.parent.run, record.parent.step) == ("long", 15)
    assert (record.steps, record.tokens) == (20, 20 * 128)
    rows, long_rows = curve(tmp_path, "branch"), curve(tmp_path, "long")
    assert rows["step"].tolist() == [16, 17, 18, 19, 20]
    assert rows["lr"].to_numpy() == pytest.approx([0.008, 0.006, 0.004, 0.002, 0.0], abs=1e-12)
    # The first step after the fork sees the parent's weights and the parent's batch.
    assert rows["loss"][0] == long_rows["loss"][15]
    assert rows["loss"][3] != long_rows["loss"][18]
    assert train(branch).final == record.final


def test_a_branch_reports_its_own_steps_and_not_its_parent_s(train, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, {6, 9})
        amplify(patch, 12)
        long = train(tiny_config(run="long", recipe="fused", tokens=40 * 128, schedule=WSD, keep_checkpoints_at=(15,)))
    assert (long.stability.skipped_steps, long.stability.first_bad_step) == (2, 6)
    assert long.stability.first_bad_layer
    assert "blocks.0.mlp.down grad_output" in long.stability.saturated_steps
    branch = tiny_config(run="branch", recipe="fused", schedule=WSD, parent={"run": "long", "step": 15})
    own = train(branch).stability
    assert (own.skipped_steps, own.first_bad_step, own.first_bad_layer) == (0, None, None)
    assert own.saturated_steps == own.underflowing_steps == {}
    # Its scales are its parent's all the same.
    assert curve(tmp_path, "branch")["loss"][0] == curve(tmp_path, "long")["loss"][15]


def test_a_resumed_branch_still_counts_what_it_skipped(train, monkeypatch) -> None:
    train(tiny_config(run="long", tokens=40 * 128, schedule=WSD, keep_checkpoints_at=(15,)))
    poison(monkeypatch, {1})
    stop_at(monkeypatch, 17, signal.SIGTERM)
    branch = tiny_config(run="branch", schedule=WSD, parent={"run": "long", "step": 15})
    with pytest.raises(Interrupted):
        train(branch)
    resumed = train(branch).stability
    assert (resumed.skipped_steps, resumed.first_bad_step) == (1, 16)


def test_a_branch_leaves_a_run_that_averages_its_weights_without_the_average(train, tmp_path) -> None:
    train(tiny_config(run="long", tokens=40 * 128, schedule=WSD, keep_checkpoints_at=(15,), average_half_life=0.25))
    record = train(tiny_config(run="branch", schedule=WSD, parent={"run": "long", "step": 15}))
    assert record.final.averaged is None
    assert curve(tmp_path, "branch")["loss"][0] == curve(tmp_path, "long")["loss"][15]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parent": {"run": "long", "step": 12}}, "no checkpoint after step 12; there: 5, 10, 15, 20"),
        ({"parent": {"run": "long", "step": 10}, "seed": 2}, r"another configuration \(seed changed\)"),
        (
            {"parent": {"run": "long", "step": 20}, "tokens": 60 * 128},
            "parent.step: 20 is not in the stable part of long, steps 2 to 15",
        ),
    ],
)
def test_a_branch_that_cannot_be_is_refused(train, changes, message) -> None:
    train(tiny_config(run="long", schedule=WSD, keep_checkpoints_at=(5, 10, 15)))
    with pytest.raises(UserError, match=message):
        train(tiny_config(**{"run": "branch", "schedule": WSD} | changes))


def test_a_plan_s_branch_leaves_the_run_of_the_name_without_suffix(tmp_path) -> None:
    path = tmp_path / "plan.yaml"
    entry = tiny_config(schedule=WSD).model_dump(mode="json", exclude={"plan", "run", "recipe", "seed", "parent"})
    entry |= {"models": [entry.pop("model")], "recipes": ["bf16", "rowwise"]}
    long = entry | {"tokens": 40 * 128}
    branch = entry | {"suffix": "-short", "parent": {"step": 15}}
    path.write_text(json.dumps({"name": "test", "description": "budgets", "entries": [long, branch]}))
    parents = {config.run: config.parent and config.parent.run for config in load_plan(path).runs}
    assert parents == {
        "tiny-bf16-s1": None,
        "tiny-rowwise-s1": None,
        "tiny-bf16-s1-short": "tiny-bf16-s1",
        "tiny-rowwise-s1-short": "tiny-rowwise-s1",
    }
    path.write_text(json.dumps({"name": "test", "description": "", "entries": [branch | {"parent": {"step": 16}}]}))
    with pytest.raises(UserError, match="after this run's decay begins, at step 15 of 20"):
        load_plan(path)


def test_budgets_of_a_plan_branch_off_one_run(train, tmp_path) -> None:
    config = tiny_config(schedule=WSD, checkpoint_interval=1000)
    entry = config.model_dump(mode="json", exclude={"plan", "run", "recipe", "seed", "parent"})
    model = entry.pop("model")
    entry |= {"models": [model], "recipes": ["bf16"], "tokens": 40 * 128}
    entry["decay_branches_at"] = [10 * 128 / parameter_count(config.model), 20 * 128 / parameter_count(config.model)]
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"name": "test", "description": "budgets", "entries": [entry]}))
    long, short, middle = (train(run) for run in load_plan(path).runs)
    assert [record.steps for record in (long, short, middle)] == [40, 10, 20]
    assert [record.parent.step for record in (short, middle)] == [8, 15]
    assert [len(curve(tmp_path, record.run)) for record in (short, middle)] == [2, 5]
    assert short.final.validation_loss > long.final.validation_loss


def test_out_of_memory_names_the_micro_batch_that_fits(train, tmp_path, monkeypatch, fault_report) -> None:
    real, attempts = session.training_loss, []

    def limited(model, hidden, targets, z_loss):
        # On a device that an earlier attempt still filled, no smaller one would fit either.
        assert not any(attempt() is not None for attempt in attempts)
        attempts.append(weakref.ref(hidden))
        if len(targets) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, hidden, targets, z_loss)

    monkeypatch.setattr(session, "training_loss", limited)
    message = r"micro_batch: 8 sequences do not fit the memory of CPU.*; 2 do$"
    with pytest.raises(OutOfMemory, match=message):
        train(tiny_config(micro_batch=8, global_batch_tokens=256))
    assert len(attempts) == 3
    record = records.read(tmp_path / "records_dir" / "test" / "tiny")
    assert record.status == "failed"
    assert "2 do" in record.reason
    fault_report(
        "memory",
        "The micro-batch does not fit the GPU's memory (simulated: the allocation fails)",
        "The run stops with one line that names the largest divisor of the micro-batch that fits, found by trying",
        recipe="bf16",
        micro_batch=8,
        named=2,
        status=record.status,
    )


def test_without_memory_for_the_optimizer_s_moments_the_run_says_so(train, tmp_path, monkeypatch) -> None:
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    # What AdamW makes its moments with, at its first step.
    monkeypatch.setattr(torch, "zeros_like", no_memory)
    with pytest.raises(OutOfMemory, match=r"micro_batch: 4 sequences do not fit .*; not even 1 does: take a smaller"):
        train()
    assert records.read(tmp_path / "records_dir" / "test" / "tiny").status == "failed"


def median_speed(root: Path, steps: list[int]) -> float:
    """Tokens a second of the median of these steps of the run, 128 tokens each."""
    table = records.read_table(root / "records_dir" / "test" / "tiny", "metrics").set_index("step")
    return 128 / table.loc[steps, "step_ms"].median() * 1e3


def test_a_run_s_speed_leaves_out_the_warm_up_after_every_start(train, tmp_path, monkeypatch) -> None:
    for step in (8, 14):
        with monkeypatch.context() as patch:
            stop_at(patch, step, signal.SIGTERM)
            with pytest.raises(Interrupted):
                train()
    interrupted = records.read(tmp_path / "records_dir" / "test" / "tiny").speed
    speed = train().speed
    assert speed.tokens_per_second_median == pytest.approx(median_speed(tmp_path, [6, 7, 8, 14, 20]))
    assert speed.wall_seconds > interrupted.wall_seconds
    assert speed.tokens_per_second_end_to_end == pytest.approx(20 * 128 / speed.wall_seconds)


def test_a_run_that_is_all_warm_up_still_has_its_time(train) -> None:
    speed = train(tiny_config(tokens=3 * 128)).speed
    assert speed.tokens_per_second_median is None
    assert speed.wall_seconds > 0
    assert speed.tokens_per_second_end_to_end == pytest.approx(3 * 128 / speed.wall_seconds)


def test_a_checkpoint_that_does_not_say_when_processes_started_resumes(train, tmp_path, monkeypatch) -> None:
    stop_at(monkeypatch, 12, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train()
    path = tmp_path / "checkpoints_dir" / "test" / "tiny" / "step-00000012"
    state = json.loads((path / "state.json").read_text())
    del state["starts"], state["peak_memory_bytes"]
    replace_file(path, "state.json", json.dumps(state).encode())
    median = train().speed.tokens_per_second_median
    assert median == pytest.approx(median_speed(tmp_path, [*range(6, 13), 18, 19, 20]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compact", [False, True])
def test_training_a_finished_run_again_changes_nothing(train, tmp_path, compact) -> None:
    first = train(tiny_config(compact=compact))
    before = files(tmp_path / "records_dir")
    assert train(tiny_config(compact=compact)) == first
    assert files(tmp_path / "records_dir") == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_finished_run_s_record_that_is_lost_is_made_anew_with_its_speed(train, tmp_path, damage) -> None:
    first = train()
    damage(tmp_path / "records_dir" / "test" / "tiny" / "record.json")
    again = train()
    assert (again.status, again.final, again.stability) == ("finished", first.final, first.stability)
    assert again.provenance.started_utc == first.provenance.started_utc
    assert again.speed.tokens_per_second_median == first.speed.tokens_per_second_median
    assert again.speed.wall_seconds > first.speed.wall_seconds * 0.5


def test_a_finished_run_whose_weights_are_gone_writes_them_again(train, tmp_path) -> None:
    first = train()
    weights = tmp_path / "checkpoints_dir" / "test" / "tiny" / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    assert train().final == first.final
    assert weights.read_bytes() == before


def test_a_checkpoint_of_other_mixture_weights_is_refused(train, monkeypatch) -> None:
    train()

    def open_reweighted(config, data_dir):
        dataset, loader = rule_data.open_data(config, data_dir)
        dataset.weights = {"odd": 0.5, "even": 0.5}
        return dataset, loader

    monkeypatch.setattr(trainer, "open_data", open_reweighted)
    with pytest.raises(UserError, match=r"the mixture's weights changed"):
        train()


def test_a_checkpoint_of_another_configuration_is_refused(train, tmp_path) -> None:
    train()
    before = (tmp_path / "records_dir" / "test" / "tiny" / "record.json").read_bytes()
    with pytest.raises(UserError, match=r"another configuration \(tokens, optimizer changed\)"):
        train(tiny_config(tokens=40 * 128, optimizer={"peak_learning_rate": 1e-3}))
    assert (tmp_path / "records_dir" / "test" / "tiny" / "record.json").read_bytes() == before


def test_a_checkpoint_from_before_a_field_was_added_resumes_with_its_default(train, tmp_path) -> None:
    train(tiny_config(tokens=128))
    path = tmp_path / "checkpoints_dir" / "test" / "tiny" / "step-00000001"
    state = json.loads((path / "state.json").read_text())
    del state["config"]["average_half_life"], state["config"]["optimizer"]["z_loss"], state["spikes"]
    state["config"]["a_field_of_old"] = 1
    replace_file(path, "state.json", json.dumps(state).encode())
    tensors = load_file(path / "trainer.safetensors")
    older = {name: tensor for name, tensor in tensors.items() if not name.startswith("streak")}
    assert len(older) == len(tensors) - 1
    replace_file(path, "trainer.safetensors", save(older))
    assert train(tiny_config(tokens=128)).status == "finished"
    with pytest.raises(UserError, match=r"another configuration \(average_half_life changed\)"):
        train(tiny_config(tokens=128, average_half_life=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": "tensorwise", "model": tiny_model(seq_len=20), "micro_batch": 1, "global_batch_tokens": 20},
            "micro_batch: 1 x seq_len 20 = 20 tokens; FP8 weight gradients need a multiple of 16",
        ),
        (
            {"recipe": "fused", "model": tiny_model(seq_len=15), "micro_batch": 16, "global_batch_tokens": 240},
            "seq_len: 15; fused transposes pairs of tokens and needs an even number",
        ),
        ({"model": tiny_model(vocab_size=128)}, "model.vocab_size: 128 is less than the 257 tokens"),
        ({"recipe": "rowwise", "high_precision": ("blocks.9.*",)}, "high_precision: 'blocks.9.*' matches no Linear"),
        ({"recipe": "fused", "high_precision": ("*.qkv",)}, "recipe: fused converts whole blocks, but of block 0 only"),
        ({"health_layers": ("blocks.9.*",)}, "health_layers: 'blocks.9.*' matches no Linear"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(train, tmp_path, changes, message) -> None:
    with pytest.raises(UserError) as error:
        train(tiny_config(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_trains_is_refused_before_its_model_is_built(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session.Session, "__init__", lambda *_: pytest.fail("a second model beside the first"))
    with (
        checkpoint.lock(tmp_path / "checkpoints_dir" / "test" / "tiny"),
        pytest.raises(UserError, match="is training this run"),
    ):
        train()


def test_without_a_compiler_the_run_goes_on_and_says_so(train, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compilation.shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert train(tiny_config(compile=True)).status == "finished"
    assert [record.message for record in caplog.records] == [
        "no C++ compiler (g++ or clang++) or no Python headers: the run is not compiled"
    ]


def test_compiled_blocks_compute_the_same_losses(train, tmp_path) -> None:
    for compiled in (False, True):
        train(tiny_config(run=f"compiled-{compiled}", compile=compiled, recipe="tensorwise", tokens=8 * 128))
    eager, compiled = (curve(tmp_path, f"compiled-{flag}")["loss"].to_numpy() for flag in (False, True))
    assert compiled == pytest.approx(eager, abs=0.08)


def test_the_live_callback_sees_the_curve_grow(train, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "FLUSH_SECONDS", 0.0)
    lengths = []
    train(on_log=lambda metrics, validation: lengths.append(len(metrics())))
    assert lengths == list(range(1, 21))


def test_tensorboard_reads_the_run(train, tmp_path) -> None:
    train()
    events = EventAccumulator(str(tmp_path / "checkpoints_dir" / "test" / "tiny" / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 21))
    assert [event.value for event in losses] == pytest.approx(curve(tmp_path)["loss"].tolist())
    assert [event.step for event in events.Scalars("validation/bits_per_byte/odd")] == [20]


def test_worker_exits_2_on_bad_input(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config().model_dump(mode="json") | {"recipe": "fp4"}))
    assert trainer.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
