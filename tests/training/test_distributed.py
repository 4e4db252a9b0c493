"""Several ranks compute what one process computes; here on a CPU, through gloo.

Starting processes is what costs time: one set of ranks makes the runs that several tests look at, and is forked from a
process that has imported the trainer. The launcher starts those that a signal or a failure stops.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pandas as pd
import pytest
import torch

from fp8lab import records
from fp8lab.config import RunConfig
from fp8lab.errors import UserError
from fp8lab.progress import read_progress
from fp8lab.training import checkpoint, distributed, launch, trainer
from fp8lab.training.checkpoint import load_model
from fp8lab.training.signals import Interrupted
from tests import forks, rule_data
from tests.checkpoints import load_latest
from tests.conftest import ROOT
from tests.faults import worker
from tests.faults.test_strangers import plain_pickle
from tests.ranks import CROWDED_RUN, POISONED_STEP, forked
from tests.rule_data import tiny_config, tiny_model

pytestmark = pytest.mark.xdist_group("distributed")  # one worker launches for all
PATIENCE_SECONDS = 240
TARGETS = {"asleep": time.sleep, "failing": sys.exit}


def train_on(ranks: int, root: Path, configs: list[RunConfig], server: ForkServerContext) -> None:
    """Train `configs` one after another on `ranks` processes."""
    path = root / "configs.json"
    path.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    arguments = ranks, root / "store", path, root
    processes = [server.Process(name=f"rank {rank}", target=forked, args=(rank, *arguments)) for rank in range(ranks)]
    failure = forks.run_all(processes, ranks, PATIENCE_SECONDS)
    assert failure is None, forks.told(failure, root)


def test_of_processes_that_run_together_the_first_to_fail_ends_all(server) -> None:
    asleep, failing = (server.Process(name=name, target=target, args=(60,)) for name, target in TARGETS.items())
    assert forks.run_all([asleep, failing], 2, PATIENCE_SECONDS) == "failing: exit code 60"
    asleep.join()
    assert asleep.exitcode == -signal.SIGKILL
    late = server.Process(name="late", target=time.sleep, args=(60,))
    assert forks.run_all([late], 1, 0.1) == "late: not ended after 0 s"
    late.join()
    assert late.exitcode == -signal.SIGKILL


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


STEPS, HALF = 6, 3


def run_of(name: str, **changes) -> RunConfig:
    """A run of six short steps, with a checkpoint half-way."""
    fields = {"run": name, "tokens": STEPS * 128, "validation_interval": HALF, "checkpoint_interval": HALF}
    return tiny_config(**fields | {"micro_batch": 1} | changes)


RECIPES = {
    "bf16": {},
    "fused": {"recipe": "fused"},
    "tensorwise": {"recipe": "tensorwise", "head": "fp8"},
}
UNEVEN = tiny_model(d_ff=63)
"""Its matrices' rows do not divide by four ranks."""
ALONE = [run_of(name, **changes) for name, changes in RECIPES.items()]
REPLICATED = [
    *ALONE,
    run_of("recomputed", recipe="fused", activation_checkpointing=True),
    run_of("large", micro_batch=2),
    run_of("poisoned", micro_batch=2),
]
SHARDED = [
    *(run_of(f"{name}-fsdp", sharding="fsdp", health_interval=HALF, **changes) for name, changes in RECIPES.items()),
    run_of("recomputed-fsdp", recipe="fused", sharding="fsdp", activation_checkpointing=True),
    run_of("moved", recipe="fused", sharding="fsdp"),
    run_of(CROWDED_RUN, sharding="fsdp", validation_interval=0, health_interval=HALF),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Runs of one process."""
    root = tmp_path_factory.mktemp("alone")
    for config in (*ALONE, run_of("moved", recipe="fused")):
        train(root, config)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory, alone, server) -> Path:
    """The same runs on two ranks, replicated and sharded, and one that one process has trained to its middle."""
    root = tmp_path_factory.mktemp("two")
    move_half_way(alone, root, "moved")
    train_on(2, root, [*REPLICATED, *SHARDED], server)
    return root


@pytest.fixture(scope="module")
def four(tmp_path_factory, server) -> Path:
    """Runs sharded over four ranks."""
    root = tmp_path_factory.mktemp("four")
    configs = [run_of("uneven", sharding="fsdp", model=UNEVEN), run_of("fused", sharding="fsdp", recipe="fused")]
    train_on(4, root, configs, server)
    return root


def move_half_way(source: Path, target: Path, run: str) -> None:
    """Give `target` the checkpoint that the run in `source` left half-way, and nothing else."""
    step = Path("checkpoints_dir", "test", run, f"step-{HALF:08d}")
    shutil.copytree(source / step, target / step)


def curves(root: Path, run: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Metrics and validations."""
    return curve(root, run), records.read_table(root / "records_dir" / "test" / run, "validation")


def assert_same_numbers(one: tuple[pd.DataFrame, ...], other: tuple[pd.DataFrame, ...], tolerance: float) -> None:
    """Curves and validations agree: nearly exactly in the first step, before differences of rounding have grown."""
    (expected, expected_validation), (found, found_validation) = one, other
    assert found["step"].tolist() == expected["step"].tolist()
    assert found["loss"][0] == pytest.approx(expected["loss"][0], abs=1e-5)
    assert found["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), abs=tolerance)
    assert found["grad_norm"].to_numpy() == pytest.approx(expected["grad_norm"].to_numpy(), rel=10 * tolerance)
    assert found_validation[["step", "domain"]].equals(expected_validation[["step", "domain"]])
    assert found_validation["loss"].to_numpy() == pytest.approx(expected_validation["loss"].to_numpy(), abs=tolerance)


@pytest.mark.parametrize("sharding", ["", "-fsdp"])
@pytest.mark.parametrize(("run", "tolerance"), [("bf16", 1e-3), ("fused", 0.01), ("tensorwise", 0.01)])
def test_two_ranks_compute_what_one_process_computes(alone, two, run, sharding, tolerance) -> None:
    assert_same_numbers(curves(alone, run), curves(two, run + sharding), tolerance)
    provenance = record(two, run + sharding).provenance
    assert (provenance.device_count, provenance.host_count) == (2, 1)


def test_torchrun_trains_the_same_run(two, tmp_path) -> None:
    config = next(config for config in SHARDED if config.run == "fused-fsdp")
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.faults.worker", str(path)]
    for name in ("records_dir", "data_dir", "checkpoints_dir"):
        command += [f"--{name.replace('_', '-')}", str(tmp_path / name)]
    environment = os.environ | forks.ENVIRONMENT
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert f"test/{config.run}: validation loss" in done.stdout
    assert record(tmp_path, config.run).provenance.device_count == 2
    assert curve(tmp_path, config.run)["loss"].tolist() == curve(two, config.run)["loss"].tolist()


def test_a_sharded_run_measures_its_health_and_keeps_whole_weights(alone, two) -> None:
    health = records.read_table(two / "records_dir" / "test" / "fused-fsdp", "health")
    assert health["step"].unique().tolist() == [HALF, STEPS]
    weights, whole = (
        load_model(root / "checkpoints_dir" / "test" / run)[0]
        for root, run in (
            (two, "bf16-fsdp"),
            (alone, "bf16"),
        )
    )
    for shared, expected in zip(weights.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(shared, expected, rtol=0.02, atol=0.02)


def test_a_leader_without_memory_for_whole_weights_measures_no_health_and_holds_up_nobody(two) -> None:
    health = records.read_table(two / "records_dir" / "test" / CROWDED_RUN, "health")
    assert health["step"].unique().tolist() == [STEPS]


@pytest.mark.parametrize(
    ("run", "changes", "tolerance"), [("uneven", {"model": UNEVEN}, 1e-3), ("fused", {"recipe": "fused"}, 0.01)]
)
def test_what_four_ranks_have_sharded_goes_on_in_one_process(four, tmp_path, run, changes, tolerance) -> None:
    move_half_way(four, tmp_path, run)
    # Where torch.distributed.checkpoint's own format keeps its index.
    index, mark = next(tmp_path.rglob("step-*")) / ".metadata", tmp_path / "executed"
    index.write_bytes(plain_pickle(mark))
    train(tmp_path, run_of(run, **changes))
    assert not mark.exists()
    assert record(tmp_path, run).provenance.device_count == 1
    assert_same_numbers(curves(four, run), curves(tmp_path, run), tolerance)


def test_what_one_process_has_begun_two_ranks_finish_sharded(alone, two) -> None:
    assert record(two, "moved").provenance.device_count == 2
    assert_same_numbers(curves(alone, "moved"), curves(two, "moved"), 0.01)


def test_a_damaged_shard_is_found(four, tmp_path) -> None:
    move_half_way(four, tmp_path, "uneven")
    path = tmp_path / "checkpoints_dir" / "test" / "uneven" / f"step-{HALF:08d}"
    assert checkpoint.find_damage(path) is None
    shards = sorted(path.glob("shard-*"))
    assert len(shards) == 4
    extra = path / "other.safetensors"
    shutil.copy(shards[0], extra)
    assert "other.safetensors is not in checksums.json" in checkpoint.find_damage(path)
    extra.unlink()
    content = bytearray(shards[2].read_bytes())
    content[-1] ^= 1
    shards[2].write_bytes(content)
    assert "does not match its SHA-256" in checkpoint.find_damage(path)
    shards[2].unlink()
    assert "is missing" in checkpoint.find_damage(path)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(two) -> None:
    table = curve(two, "poisoned")
    assert table[table["skipped"]]["step"].tolist() == [POISONED_STEP]
    assert record(two, "poisoned").stability.first_bad_step == POISONED_STEP
    before = curve(two, "large")[: POISONED_STEP - 1]
    pd.testing.assert_series_equal(table["loss"][: POISONED_STEP - 1], before["loss"], check_exact=True)
    # The batch that was skipped is lost: the weights that meet the next one are those of the step before it.
    assert table["loss"][POISONED_STEP:].notna().all()


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
    for sharding in ("", "-fsdp"):
        losses = [curve(two, run + sharding)["loss"] for run in ("fused", "recomputed")]
        pd.testing.assert_series_equal(*losses, check_exact=True)


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


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "meet", lambda: distributed.World(0, 2))
    with pytest.raises(UserError, match="128 is not a multiple of processes x micro_batch x seq_len = 2 x 4 x 32 "):
        train(tmp_path, tiny_config(micro_batch=4))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_one_rank_is_the_reason_that_all_give(tmp_path, monkeypatch, capfd, fault_report) -> None:
    monkeypatch.setattr(launch, "WORKER", "tests.faults.worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(worker.OUT_OF_MEMORY, "1,3")
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    advice = "micro_batch: 2 sequences do not fit the memory of CPU"
    with pytest.raises(UserError, match=advice):
        launch.launch(tiny_config(run="full", micro_batch=2), 2, **folders)
    left = record(tmp_path, "full")
    assert (left.status, left.steps) == ("failed", 2)
    assert left.reason.startswith(f"rank 1: {advice}")
    assert f"fp8lab: rank 1: {advice}" in capfd.readouterr().err
    fault_report(
        "memory",
        "One rank of two runs out of memory (simulated: the allocation fails)",
        "All stop; the record, the launcher and that rank itself name it and give its reason, not the lost connection "
        "that the others saw",
        recipe="bf16",
        reason=left.reason,
        status=left.status,
    )


def test_each_rank_casts_a_weight_once_a_step_whatever_the_micro_steps_and_recomputations(two) -> None:
    # Two micro-steps a step; two blocks of four weights.
    for rank in range(2):
        casts = json.loads((two / f"casts-{rank}.json").read_text())
        for run in ("fused", "recomputed", "fused-fsdp", "recomputed-fsdp"):
            assert casts[run] == STEPS * 2 * 4
