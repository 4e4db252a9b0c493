"""Estimates of memory, held against the peaks that the committed records measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8lab import estimate
from fp8lab.analysis.occasions import speed_runs
from fp8lab.config import MODELS, OptimizerConfig, ParentConfig, RunConfig

ROOT = Path(__file__).parents[1]


def config(model: str, seq_len: int, micro_batch: int) -> RunConfig:
    sized = MODELS[model].model_copy(update={"seq_len": seq_len})
    batch = seq_len * micro_batch
    return RunConfig(
        plan="p", run="r", model=sized, recipe="bf16", seed=1, mixture="demo", tokens=batch, global_batch_tokens=batch,
        micro_batch=micro_batch, optimizer=OptimizerConfig(peak_learning_rate=1e-3),
    )  # fmt: skip


def test_memory_is_what_was_measured() -> None:
    measured = {}
    for speed in speed_runs(ROOT / "runs" / "records"):
        steps = speed.steps[(speed.steps["recipe"] == "bf16") & (speed.steps["head"] == "bf16")]
        measured |= steps.groupby(["model", "seq_len", "micro_batch"])["peak_memory_bytes"].max().to_dict()
    assert len(measured) >= 3
    for (model, seq_len, micro_batch), peak in measured.items():
        assert estimate.memory_bytes(config(model, seq_len, micro_batch)) == pytest.approx(peak, rel=0.07), model


def test_a_branch_costs_its_own_steps() -> None:
    run = config("7M", 1024, 128)
    long = run.model_copy(update={"tokens": 100 * run.global_batch_tokens})
    branch = long.model_copy(update={"parent": ParentConfig(run="r", step=75)})
    assert estimate.hours(branch, 0.4, 1) == pytest.approx(estimate.hours(long, 0.4, 1) / 4)
