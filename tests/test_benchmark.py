"""The trainer's benchmarks at toy scale: what their figures are figures of."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from fp8lab import records
from fp8lab.benchmark import overhead, paced, resuming, saving
from fp8lab.benchmark.__main__ import app
from fp8lab.training import trainer
from fp8lab.training.checkpoint import CheckpointWriter
from fp8lab.training.health import HealthProbe
from fp8lab.training.session import Session
from tests import rule_data
from tests.faults import worker
from tests.rule_data import tiny_config, tiny_model


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._seconds = 0.0
        monkeypatch.setattr(paced, "time", SimpleNamespace(perf_counter=lambda: self._seconds))

    def takes(self, owner: object, name: str, seconds: float) -> None:
        """Let each call of a function take so long."""
        real = getattr(owner, name)

        def timed(*arguments: object, **keywords: object) -> object:
            self._seconds += seconds
            return real(*arguments, **keywords)

        self._monkeypatch.setattr(owner, name, timed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_overhead_is_what_the_trainer_adds_to_the_bare_step(tmp_path: Path, clock: Clock) -> None:
    clock.takes(overhead, "optimizer_step", 0.10)
    clock.takes(Session, "take_step", 0.11)
    clock.takes(Session, "validate", 2.0)
    clock.takes(HealthProbe, "measure", 0.4)
    # A step of the plan is two micro-batches, so it validates every 40 of the benchmark's steps.
    config = tiny_config(validation_interval=20, health_interval=5, global_batch_tokens=256)
    results = overhead.measure_overhead(config, data_dir=tmp_path, scratch=tmp_path, rounds=2, steps_per_round=3)
    measured = {name: value["rounds"] for name, value in results.items() if isinstance(value, dict)}
    assert measured == {
        "bare_step_seconds": pytest.approx([0.10, 0.10]),
        "trainer_step_seconds": pytest.approx([0.11, 0.11]),
        "validation_seconds": pytest.approx([2.0, 2.0]),
        "health_seconds": pytest.approx([0.4, 0.4]),
        "loop_share": pytest.approx([0.10, 0.10]),
        "validation_share": pytest.approx([0.5, 0.5]),
        "health_share": pytest.approx([0.4, 0.4]),
        "overhead": pytest.approx([1.0, 1.0]),
    }


def test_what_a_plan_does_not_ask_for_adds_nothing(tmp_path: Path, clock: Clock) -> None:
    clock.takes(overhead, "optimizer_step", 0.10)
    clock.takes(Session, "take_step", 0.11)
    clock.takes(Session, "validate", 2.0)
    config = tiny_config(validation_interval=0, health_interval=0)
    results = overhead.measure_overhead(config, data_dir=tmp_path, scratch=tmp_path, rounds=1, steps_per_round=3)
    assert results["validation_share"] is None
    assert results["health_share"] is None
    assert results["overhead"]["median"] == results["loop_share"]["median"] == pytest.approx(0.10)


def test_the_cost_of_a_checkpoint_is_what_rounds_with_one_take_longer(tmp_path: Path, clock: Clock) -> None:
    clock.takes(Session, "take_step", 0.1)
    clock.takes(CheckpointWriter, "save", 3.0)
    results = saving.measure_checkpoint(tiny_config(), data_dir=tmp_path, scratch=tmp_path, rounds=2, steps_per_round=4)
    assert results["step_seconds"]["rounds"] == pytest.approx([0.1, 0.1])
    assert results["lost_seconds"]["rounds"] == pytest.approx([3.0, 3.0])
    # 500 steps take 50 seconds.
    assert results["cost"]["rounds"] == pytest.approx([0.06, 0.06])
    assert results["first_stall_seconds"] == results["stall_seconds"]["median"] == pytest.approx(3.0)
    assert len(results["write_seconds"]["rounds"]) == 2
    # FP32 weights and two moments.
    assert results["checkpoint_bytes"] > 3 * 4 * 272 * 32


def train_by_the_rule(arguments: list[str], output: Path) -> None:
    """The worker, on tokens made by the rule."""
    trainer.open_data = rule_data.open_data  # type: ignore[assignment]
    resuming._train(arguments, output)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> resuming.StartWorker:
    """Starts workers that have imported everything already."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__, __name__])

    def forked(arguments: list[str], output: Path) -> BaseProcess:
        process = context.Process(target=train_by_the_rule, args=(arguments, output))
        process.start()
        return process

    return forked


def test_a_killed_and_resumed_run_is_compared_with_whole_ones(tmp_path: Path, start: resuming.StartWorker) -> None:
    # Steps of some milliseconds: the kill must come before the end.
    config = tiny_config(recipe="fused", model=tiny_model(d_model=64, d_ff=192))
    results = resuming.measure_resume(config, data_dir=tmp_path, scratch=tmp_path, steps=24, start=start)
    assert results["killed_after_checkpoint"] in (6, 12, 18)
    for what in ("control", "resumed"):
        assert results[what]["weights_identical"]
        assert results[what]["curve_identical"]
        assert results[what]["largest_weight_difference"] == results[what]["largest_loss_difference"] == 0
        assert results[what]["equal_weights_share"] == 1
        assert results[what]["steps_logged"] == [24, 24]


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("other", "logged", "first", "largest"),
    [
        ([3.0, NAN, INFINITE, 2.0], 4, None, 0.0),
        ([3.0, 2.5, INFINITE, 1.5], 4, 2, 0.5),
        ([3.0, NAN, NAN, 2.0], 4, 3, 0.0),
        ([3.0, NAN, INFINITE, NAN], 4, 4, 0.0),
        ([3.0, NAN, INFINITE], 3, 4, 0.0),
    ],
)
def test_a_loss_that_is_a_number_in_one_curve_alone_tells_them_apart(
    other: list[float], logged: int, first: int | None, largest: float
) -> None:
    whole, resumed = (
        pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
        for losses in ([3.0, NAN, INFINITE, 2.0], other)
    )
    for curves in ((whole, resumed), (resumed, whole)):
        compared = resuming._compare_curves(*curves)
        assert compared["curve_identical"] == (first is None)
        assert compared["first_different_step"] == first
        assert compared["largest_loss_difference"] == largest
    assert compared["steps_logged"] == [logged, 4]


def test_a_worker_that_says_more_than_a_pipe_holds_is_heard_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(_: list[str]) -> int:
        os.write(2, b"word " * 100_000 + b"the end")
        return 3

    def start(arguments: list[str], output: Path) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=resuming._train, args=(arguments, output))
        process.start()
        return process

    monkeypatch.setattr(trainer, "main", main)
    with pytest.raises(RuntimeError, match=r"the worker ended with 3: (?:word )+the end"):
        resuming.measure_resume(tiny_config(), data_dir=tmp_path, scratch=tmp_path, steps=8, start=start)


def test_a_benchmark_writes_a_record_of_what_it_measured(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    entry = tiny_config().model_dump(mode="json", exclude={"plan", "run", "model", "recipe", "seed", "parent"})
    values = {"name": "test", "description": "x", "entries": [entry | {"models": ["7M"], "recipes": ["bf16"]}]}
    values["entries"][0] |= {"models": [tiny_model().model_dump(mode="json")]}
    plan.write_text(records.json.dumps(values))
    arguments = ["overhead", str(plan), "tiny-bf16-s1", "--rounds", "1", "--steps-per-round", "2"]
    arguments += ["--records-dir", str(tmp_path / "records"), "--scratch", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = records.read(tmp_path / "records" / "benchmarks" / "trainer-overhead-tiny-bf16")
    assert isinstance(record, records.BenchmarkRecord)
    assert (record.status, record.results["model"], record.results["tokens_a_step"]) == ("finished", "tiny", 128)
    assert record.config["run"] == "tiny-bf16-s1"
    assert "overhead" in done.output
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["records"]
