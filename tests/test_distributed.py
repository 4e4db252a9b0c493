"""Several ranks compute what one process computes; here on a CPU, through gloo.

Starting processes is what costs time: one launch makes the runs that several tests look at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import launch, records, trainer
from fp8lab.checkpoint import load_latest
from fp8lab.config import RunConfig
from fp8lab.errors import UserError
from fp8lab.progress import read_progress
from fp8lab.trainer import Interrupted
from tests import rule_data
from tests.conftest import ROOT
from tests.rule_data import tiny_config

PATIENCE_SECONDS = 240


def torchrun(ranks: int, root: Path, configs: list[RunConfig]) -> None:
    """Train `configs` one after another on `ranks` processes."""
    path = root / f"configs-{ranks}.json"
    path.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.ranks", str(path), str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr


def train(root: Path, config: RunConfig) -> None:
    """Train `config` in this process."""
    folders = {name: root / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_data", rule_data.open_data)
        trainer.train(config, **folders)


def curve(root: Path, run: str) -> pd.DataFrame:
    return records.read_table(root / "records_dir" / "test" / run, "metrics")


def record(root: Path, run: str) -> records.TrainRecord:
    found = records.read(root / "records_dir" / "test" / run)
    assert isinstance(found, records.TrainRecord)
    return found


STEPS = 6
CONFIGS = {
    name: tiny_config(run=name, tokens=STEPS * 128, validation_interval=3, micro_batch=1, **changes)
    for name, changes in {
        "bf16": {},
        "fused": {"recipe": "fused"},
        "recomputed": {"recipe": "fused", "activation_checkpointing": True},
        "tensorwise": {"recipe": "tensorwise", "head": "fp8"},
    }.items()
}
LARGE_BATCH = tiny_config(run="large", tokens=STEPS * 128, validation_interval=3, micro_batch=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Runs of one process."""
    root = tmp_path_factory.mktemp("alone")
    for config in CONFIGS.values():
        train(root, config)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The same runs on two ranks."""
    root = tmp_path_factory.mktemp("two")
    torchrun(2, root, [*CONFIGS.values(), LARGE_BATCH])
    return root


def assert_same_numbers(one: Path, other: Path, run: str, tolerance: float) -> None:
    """Curves and validations agree: nearly exactly in the first steps, before differences of rounding have grown."""
    expected, found = curve(one, run), curve(other, run)
    assert found["step"].tolist() == expected["step"].tolist()
    assert found["loss"][0] == pytest.approx(expected["loss"][0], abs=1e-5)
    assert found["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), abs=tolerance)
    assert found["grad_norm"].to_numpy() == pytest.approx(expected["grad_norm"].to_numpy(), rel=10 * tolerance)
    tables = [records.read_table(root / "records_dir" / "test" / run, "validation") for root in (one, other)]
    assert tables[0][["step", "domain"]].equals(tables[1][["step", "domain"]])
    assert tables[1]["loss"].to_numpy() == pytest.approx(tables[0]["loss"].to_numpy(), abs=tolerance)


@pytest.mark.parametrize(("run", "tolerance"), [("bf16", 1e-3), ("fused", 0.01), ("tensorwise", 0.01)])
def test_two_ranks_compute_what_one_process_computes(alone, two, run, tolerance) -> None:
    assert_same_numbers(alone, two, run, tolerance)
    assert (record(two, run).provenance.device_count, record(two, run).provenance.host_count) == (2, 1)


def test_gradient_accumulation_on_several_ranks_gives_the_large_batch_s_numbers(two) -> None:
    parts, whole = curve(two, "bf16"), curve(two, "large")
    assert parts["loss"].to_numpy() == pytest.approx(whole["loss"].to_numpy(), abs=0.005)
    assert parts["grad_norm"].to_numpy() == pytest.approx(whole["grad_norm"].to_numpy(), rel=0.02)


def fp8_state(root: Path, run: str) -> dict:
    state = load_latest(root / "checkpoints_dir" / "test" / run)
    assert state is not None
    return {name: tensor for name, tensor in state.model.items() if name.startswith("fp8_state.")}


def test_amax_histories_are_the_largest_of_all_ranks_and_move_once_a_step(alone, two) -> None:
    expected, found = fp8_state(alone, "fused"), fp8_state(two, "fused")
    history = found["fp8_state.history"]
    assert int(found["fp8_state.steps"]) == STEPS
    assert (history[:STEPS] > 0).all()
    assert (history[STEPS:] == 0).all()
    # In the first step, before roundings have parted the runs: a rank's own rows would give less.
    assert history[0].numpy() == pytest.approx(expected["fp8_state.history"][0].numpy(), rel=0.05)
    assert history.numpy() == pytest.approx(expected["fp8_state.history"].numpy(), rel=0.3)


def test_recomputing_activations_moves_no_history(two) -> None:
    kept, recomputed = fp8_state(two, "fused"), fp8_state(two, "recomputed")
    assert all(kept[name].equal(recomputed[name]) for name in kept)
    pd.testing.assert_series_equal(curve(two, "fused")["loss"], curve(two, "recomputed")["loss"], check_exact=True)


def test_a_signal_to_one_rank_stops_all_at_a_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "WORKER", "tests.faults.worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = tiny_config(run="stopped", micro_batch=2, tokens=20_000 * 128, checkpoint_interval=20_000)
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    work = folders["checkpoints_dir"] / "test" / "stopped"

    def stop() -> None:
        while (progress := read_progress(work / "progress.json")) is None or progress.stage != "training":
            time.sleep(0.05)
        os.kill(progress.pid, signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        launch.launch(config, 2, **folders)
    assert stopped.value.exit_code == 143
    left = record(tmp_path, "stopped")
    assert (left.status, left.provenance.device_count) == ("interrupted", 2)
    state = load_latest(work)
    assert state is not None
    assert state.step == left.steps == len(curve(tmp_path, "stopped"))


def test_a_mistake_of_all_ranks_is_one_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "WORKER", "tests.faults.worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    with pytest.raises(UserError, match="128 is not a multiple of processes x micro_batch x seq_len = 2 x 4 x 32 "):
        launch.launch(tiny_config(micro_batch=4), 2, **folders)
