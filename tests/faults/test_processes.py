"""Faults done for real, to the training worker in a process of its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import records
from fp8lab.config import RunConfig
from fp8lab.progress import read_progress
from tests.checkpoints import load_latest
from tests.conftest import ROOT
from tests.rule_data import tiny_config, tiny_model

PATIENCE_SECONDS = 120


class Worker:
    """One run's worker, started as often as the test likes."""

    def __init__(self, root: Path, config: RunConfig, prefix: tuple[str, ...] = ()) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.checkpoints = root / "checkpoints" / config.plan / config.run
        self.record_folder = root / "records" / config.plan / config.run
        path = root / "config.json"
        path.write_text(config.model_dump_json())
        self._command = [*prefix, sys.executable, "-m", "tests.faults.worker", str(path)]
        self._command += ["--records-dir", str(root / "records"), "--checkpoints-dir", str(root / "checkpoints")]

    def start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self._command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self) -> tuple[int, str]:
        process = self.start()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, errors

    def record(self) -> records.TrainRecord:
        record = records.read(self.record_folder)
        assert isinstance(record, records.TrainRecord)
        return record

    def curve(self) -> pd.DataFrame:
        table = records.read_table(self.record_folder, "metrics")
        return table[["step", "tokens", "loss", "lr", "grad_norm", "skipped"]]

    def weights(self) -> bytes:
        return (self.checkpoints / "model.safetensors").read_bytes()

    def training_since(self, started: float) -> bool:
        progress = read_progress(self.checkpoints / "progress.json")
        return progress is not None and progress.stage == "training" and progress.updated_utc.timestamp() > started

    def half_written(self) -> list[Path]:
        return list(self.checkpoints.glob(".step-*.tmp"))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> bool:
    """Poll until `condition` or the end of `process`; True if the condition came first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0002)
    raise AssertionError("nothing happened")


def assert_same_run(whole: Worker, parts: Worker) -> None:
    assert whole.record().final == parts.record().final
    pd.testing.assert_frame_equal(whole.curve(), parts.curve(), check_exact=True)
    assert whole.weights() == parts.weights()


def kill(worker: Worker, *, after: float | None) -> bool:
    """Start the worker and kill -9 it: some seconds into training, or (None) while it writes a checkpoint.

    True if it died of the kill, and in the second case left a half-written checkpoint behind.
    """
    started = time.time()
    process = worker.start()
    if after is None:
        wait_for(worker.half_written, process)
    else:
        wait_for(lambda: worker.training_since(started), process)
        time.sleep(after)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL and (after is not None or bool(worker.half_written()))


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_killed_at_random_moments_and_during_writes_the_run_ends_bit_identical(tmp_path, recipe) -> None:
    # Wide enough that a checkpoint takes a moment to write.
    config = tiny_config(
        recipe=recipe, model=tiny_model(d_model=128, d_ff=384), tokens=120 * 128, checkpoint_interval=4
    )
    whole, parts = Worker(tmp_path / "whole", config), Worker(tmp_path / "parts", config)
    assert whole.run() == (0, "")
    moments = random.Random(recipe)
    kills = [kill(parts, after=moments.uniform(0.0, 0.4)) for _ in range(3)]
    # A kill may come a moment after the rename: then it was one more at a random moment.
    while kills.count(True) < 5:
        kills.append(kill(parts, after=None))
        assert len(kills) < 12
    code, _ = parts.run()
    assert code == 0
    assert parts.half_written() == []
    assert_same_run(whole, parts)


def test_signals_checkpoint_within_a_step_and_exit_with_their_code(tmp_path) -> None:
    config = tiny_config(tokens=300 * 128, checkpoint_interval=1000)
    whole, parts = Worker(tmp_path / "whole", config), Worker(tmp_path / "parts", config)
    assert whole.run() == (0, "")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        started = time.time()
        process = parts.start()
        wait_for(lambda since=started: parts.training_since(since), process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == code
        assert errors.startswith(f"fp8lab: stopped by {number.name} after step")
        record = parts.record()
        assert record.status == "interrupted"
        state = load_latest(parts.checkpoints)
        assert state is not None
        assert state.step == record.steps == len(parts.curve())
    assert parts.run() == (0, "")
    assert_same_run(whole, parts)


def test_a_second_process_is_refused_and_a_dead_one_s_lock_is_not_in_the_way(tmp_path) -> None:
    worker = Worker(tmp_path, tiny_config(tokens=3000 * 128, checkpoint_interval=1000))
    started = time.time()
    first = worker.start()
    wait_for(lambda: worker.training_since(started), first)
    record = (worker.record_folder / "record.json").read_bytes()
    code, errors = worker.run()
    assert code == 2
    assert f"process {first.pid} is training this run" in errors
    assert (worker.record_folder / "record.json").read_bytes() == record
    first.kill()
    first.communicate()
    started = time.time()
    heir = worker.start()
    assert wait_for(lambda: worker.training_since(started), heir)
    heir.terminate()
    heir.communicate(timeout=PATIENCE_SECONDS)
    assert heir.returncode == 143


def small_disk(folder: Path, kilobytes: int) -> tuple[str, ...]:
    """A command prefix under which `folder` is a tmpfs of its own, gone when the command ends.

    Where the system lets nobody mount one, the prefix limits the size of files instead: writes fail as well.
    """
    script = f'mount -t tmpfs -o size={kilobytes}k tmpfs "{folder}" && exec "$@"'
    for prefix in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        probe = [*prefix, "sh", "-c", script, "sh", "true"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return (*prefix, "sh", "-c", script, "sh")
    return ("sh", "-c", f'ulimit -f {kilobytes // 2}; trap "" XFSZ; exec "$@"', "sh")


def test_disk_full_while_writing_a_checkpoint_keeps_the_last_good_one(tmp_path) -> None:
    config = tiny_config(tokens=60 * 128, checkpoint_interval=10)
    disk = tmp_path / "checkpoints"
    disk.mkdir()
    # One checkpoint of this model takes about 350 kB, so two fit and a third does not.
    report = tmp_path / "report"
    prefix = small_disk(disk, 900)
    # What is on the tmpfs is looked at from inside, after the worker has stopped.
    look = f'"$@"; code=$?; (cd "{disk}" && find . -name "step-*" -o -name ".step-*") >"{report}"; exit $code'
    worker = Worker(tmp_path, config, (*prefix, "sh", "-c", look, "sh"))
    code, _ = worker.run()
    assert code == 1
    record = worker.record()
    assert record.status == "failed"
    assert "No space left on device" in record.reason or "File too large" in record.reason
    kept = sorted(Path(line).name for line in report.read_text().split())
    assert kept
    assert all(name.startswith("step-") for name in kept)
