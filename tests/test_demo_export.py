"""A model that was trained, in FP8, opens elsewhere and scores there what it scores here."""

from __future__ import annotations

from pathlib import Path

from fp8lab.data import TokenDataset, load_mixture
from fp8lab.evaluation.adapter import GPTAdapter
from fp8lab.evaluation.suites import demo_suite
from fp8lab.export import export
from fp8lab.training.checkpoint import load_model
from tests.conftest import DemoRuns
from tests.test_export import assert_same_scores


def test_a_trained_model_scores_the_same_in_lm_evals_own_adapter(demo_runs: DemoRuns, tmp_path: Path) -> None:
    config = next(config for config in demo_runs.plan.runs if config.recipe == "tensorwise")
    run_folder = demo_runs.checkpoints_dir / config.plan / config.run
    export(run_folder, tmp_path / "model", data_dir=demo_runs.data_dir)
    model, _ = load_model(run_folder)
    dataset = TokenDataset.open(load_mixture(config.mixture), demo_runs.data_dir)
    (tmp_path / "tasks").mkdir()
    adapter = GPTAdapter(model, dataset.encoding, bf16=False)
    assert_same_scores(demo_suite(tmp_path / "tasks", dataset), adapter, tmp_path / "model")
