"""Faults done for real, to the training worker in a process of its own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import records
from fp8lab.config import RunConfig
from tests.checkpoints import load_latest
from tests.conftest import ROOT
from tests.faults import worker
from tests.faults.worker import Moment
from tests.forks import ENVIRONMENT
from tests.rule_data import tiny_config, tiny_model

PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class Waiting:
    """A worker that waits where the test wants it."""

    process: ForkServerProcess
    gate: Connection

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def go_on(self) -> int | None:
        """Let it go on, to its end; its exit code."""
        self.gate.send(None)
        self.process.join(PATIENCE_SECONDS)
        return self.process.exitcode


class Worker:
    """One run's worker, started as often as the test likes."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.checkpoints = root / "checkpoints" / config.plan / config.run
        self.record_folder = root / "records" / config.plan / config.run
        path = root / "config.json"
        path.write_text(config.model_dump_json())
        self.arguments = [str(path), "--records-dir", str(root / "records")]
        self.arguments += ["--checkpoints-dir", str(root / "checkpoints")]
        self._errors = root / "errors.txt"

    def start(self, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start the command as a user would; `prefix` is put before it."""
        command = [*prefix, sys.executable, "-m", "tests.faults.worker", *self.arguments]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True)

    def fork(self, server: ForkServerContext, wait: tuple[Moment, int, Connection] | None = None) -> ForkServerProcess:
        """Start a process that has imported everything already: seconds less a start."""
        process = server.Process(target=worker.forked, args=(self.arguments, self._errors, wait))
        process.start()
        return process

    def fork_until(self, server: ForkServerContext, moment: Moment, step: int) -> Waiting:
        """Start a process and wait until it waits at `moment` of `step`."""
        gate, other_end = server.Pipe()
        process = self.fork(server, (moment, step, other_end))
        other_end.close()
        assert gate.poll(PATIENCE_SECONDS)
        try:
            gate.recv()
        except EOFError:
            raise AssertionError(f"it ended before step {step}: {self._errors.read_text()}") from None
        return Waiting(process, gate)

    def run(self, server: ForkServerContext) -> tuple[int | None, str]:
        """Train until the process ends; its exit code and standard error."""
        process = self.fork(server)
        process.join(PATIENCE_SECONDS)
        return process.exitcode, self.errors()

    def errors(self) -> str:
        """Standard error of the last forked process."""
        return self._errors.read_text()

    def record(self) -> records.TrainRecord:
        record = records.read(self.record_folder)
        assert isinstance(record, records.TrainRecord)
        return record

    def curve(self) -> pd.DataFrame:
        return self.table("metrics")[["step", "tokens", "loss", "lr", "grad_norm", "skipped"]]

    def table(self, name: str) -> pd.DataFrame:
        return records.read_table(self.record_folder, name)

    def weights(self) -> bytes:
        return (self.checkpoints / "model.safetensors").read_bytes()

    def half_written(self) -> list[Path]:
        return list(self.checkpoints.glob(".step-*.tmp"))

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)


def assert_same_run(whole: Worker, parts: Worker) -> None:
    assert whole.record().final == parts.record().final
    assert_same_tables(whole, parts)
    assert whole.weights() == parts.weights()


def assert_same_tables(whole: Worker, parts: Worker) -> None:
    pd.testing.assert_frame_equal(whole.curve(), parts.curve(), check_exact=True)
    for name in ("validation", "health"):
        pd.testing.assert_frame_equal(whole.table(name), parts.table(name), check_exact=True)


STEPS, INTERVAL = 31, 3
MEASURED = {"validation_interval": 6, "health_interval": 4}
"""What a run measures of itself on the way, so that a measurement lost or made twice is seen."""


def ten_moments(seed: str) -> list[tuple[Moment, int]]:
    """Ten random moments of a run, in order of steps; four of them inside the writing of a checkpoint."""
    choice = random.Random(seed)
    moments = [Moment.WRITING] * 4 + [Moment.STEPPING, Moment.RECORDING, Moment.WRITTEN, Moment.STARTING]
    moments.append(choice.choice([Moment.STEPPING, Moment.RECORDING, Moment.WRITTEN]))
    choice.shuffle(moments)
    steps = sorted(choice.sample(range(1, STEPS), len(moments)))
    with_checkpoint = {Moment.RECORDING, Moment.WRITING, Moment.WRITTEN}
    timed = [
        (moment, -(-step // INTERVAL) * INTERVAL if moment in with_checkpoint else step)
        for moment, step in zip(moments, steps, strict=True)
    ]
    return [*timed, (Moment.FINISHING, STEPS)]


@pytest.mark.parametrize("recipe", ["bf16", "fused"])
def test_killed_at_ten_moments_the_run_ends_bit_identical(tmp_path, server, recipe, fault_report) -> None:
    changes = {"model": tiny_model(n_layers=1), "tokens": STEPS * 128, "checkpoint_interval": INTERVAL}
    config = tiny_config(recipe=recipe, **changes, **MEASURED)
    whole = Worker(tmp_path / "whole", config.model_copy(update={"checkpoint_interval": 1000}))
    parts = Worker(tmp_path / "parts", config)
    assert whole.run(server) == (0, "")
    resumed_from, half_written = [], 0
    moments = ten_moments(recipe)
    for moment, step in moments:
        parts.fork_until(server, moment, step).kill()
        assert parts.half_written() or moment is not Moment.WRITING
        half_written += moment is Moment.WRITING
        resumed_from.append(parts.newest_checkpoint())
    assert parts.run(server) == (0, "")
    assert parts.half_written() == []
    assert_same_run(whole, parts)
    fault_report(
        "kill",
        "`kill -9`, ten times: at random moments, and while a checkpoint was being written",
        "The same command resumes from the newest whole checkpoint; final weights, logged curve, validations and "
        "health are bit-identical to those of a run that nobody killed",
        recipe=recipe,
        kills=len(moments),
        kills_that_left_a_half_written_checkpoint=half_written,
        killed=[f"step {step}: {moment}" for moment, step in moments],
        newest_whole_checkpoint_at_each_kill=resumed_from,
        steps=config.steps,
    )


def test_signals_checkpoint_within_a_step_and_exit_with_their_code(tmp_path, server, fault_report) -> None:
    config = tiny_config(checkpoint_interval=1000, **MEASURED)
    whole, parts = Worker(tmp_path / "whole", config), Worker(tmp_path / "parts", config)
    assert whole.run(server) == (0, "")
    # A validation is due after step 6.
    for number, code, step in ((signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 13)):
        waiting = parts.fork_until(server, Moment.STEPPING, step)
        os.kill(waiting.process.pid, number)
        assert waiting.go_on() == code
        assert parts.errors() == f"fp8lab: stopped by {number.name} after step {step}; the same command resumes\n"
        record = parts.record()
        assert (record.status, record.steps) == ("interrupted", step)
        state = load_latest(parts.checkpoints)
        assert state is not None
        assert state.step == len(parts.curve()) == step
        fault_report(
            "signal",
            f"{number.name}, the scheduler's or the user's request to stop",
            "The step under way is finished and checkpointed, the record says `interrupted`, the exit code names the "
            "signal; the same command resumes and ends bit-identical",
            recipe="bf16",
            exit_code=code,
            arrived_in_step=step,
            stopped_after_step=state.step,
            steps=config.steps,
        )
    assert parts.run(server) == (0, "")
    assert_same_run(whole, parts)


@pytest.mark.parametrize("moment", [Moment.RECORDING, Moment.RECORDED])
def test_a_compact_run_killed_while_its_record_is_written_has_all_of_it_or_is_not_finished(
    tmp_path, server, moment, fault_report
) -> None:
    config = tiny_config(compact=True, checkpoint_interval=1000, **MEASURED)
    whole, parts = Worker(tmp_path / "whole", config), Worker(tmp_path / "parts", config)
    assert whole.run(server) == (0, "")
    # It writes its record at its start and at its end alone.
    parts.fork_until(server, moment, config.steps).kill()
    status = parts.record().status
    if status != "finished":
        assert parts.run(server) == (0, "")
    assert whole.record().final == parts.record().final
    assert_same_tables(whole, parts)
    fault_report(
        "kill",
        "`kill -9` of a run that keeps no checkpoint, while it writes its record at its end",
        "`record.json` comes last: a run that it calls finished has all its tables, and any other is trained again",
        recipe="bf16",
        killed=[f"step {config.steps}: {moment}"],
        status=status,
        steps=config.steps,
    )


def test_a_second_process_is_refused_and_a_dead_one_s_lock_is_not_in_the_way(tmp_path, server, fault_report) -> None:
    run = Worker(tmp_path, tiny_config())
    first = run.fork_until(server, Moment.STEPPING, 5)
    record = (run.record_folder / "record.json").read_bytes()
    code, errors = run.run(server)
    assert code == 2
    assert f"process {first.process.pid} is training this run" in errors
    assert (run.record_folder / "record.json").read_bytes() == record
    first.kill()
    assert run.run(server) == (0, "")
    fault_report(
        "lock",
        "A second process on a run that one trains already; then the first is killed and a third started",
        "The second is refused by name of the first and changes nothing; the dead one's lock does not block the third",
        recipe="bf16",
        exit_code_of_the_second=code,
    )


def small_disk(folder: Path, kilobytes: int) -> tuple[str, tuple[str, ...]]:
    """A command prefix under which `folder` is a tmpfs of its own, gone when the command ends; and what it is.

    Where the system lets nobody mount one, the prefix limits the size of files instead: writes fail as well.
    """
    script = f'mount -t tmpfs -o size={kilobytes}k tmpfs "{folder}" && exec "$@"'
    for prefix in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        probe = [*prefix, "sh", "-c", script, "sh", "true"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return f"tmpfs of {kilobytes} kB", (*prefix, "sh", "-c", script, "sh")
    limit = f'ulimit -f {kilobytes // 2}; trap "" XFSZ; exec "$@"'
    return f"no file above {kilobytes // 2} blocks", ("sh", "-c", limit, "sh")


@pytest.mark.parametrize("recipe", ["bf16", "fused"])
def test_disk_full_while_writing_a_checkpoint_keeps_the_last_good_one(tmp_path, server, recipe, fault_report) -> None:
    config = tiny_config(recipe=recipe, tokens=60 * 128, checkpoint_interval=10, **MEASURED)
    run, whole = Worker(tmp_path / "full", config), Worker(tmp_path / "whole", config)
    disk, rescued = tmp_path / "full" / "checkpoints", tmp_path / "rescued"
    disk.mkdir()
    # One checkpoint of this model takes about 350 kB, so two fit and a third does not.
    kind, prefix = small_disk(disk, 900)
    # The tmpfs is gone with the command: what it holds is copied from inside, after the worker has stopped.
    copy = f'"$@"; code=$?; cp -r "{disk}" "{rescued}"; exit $code'
    process = run.start((*prefix, "sh", "-c", copy, "sh"))
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    record = run.record()
    assert record.status == "failed"
    assert "No space left on device" in record.reason or "File too large" in record.reason
    # The disk as it was found, with room on it now.
    shutil.rmtree(disk)
    rescued.rename(disk)
    assert run.half_written() == []
    state = load_latest(run.checkpoints)
    assert state is not None
    stopped_after = record.steps
    assert whole.run(server) == run.run(server) == (0, "")
    assert_same_run(whole, run)
    fault_report(
        "disk",
        "The disk is full while a checkpoint is written",
        "The half-written one is removed, the last good one stays, the run stops and its record gives the reason; with "
        "room again the same command resumes and ends bit-identical",
        recipe=recipe,
        disk=kind,
        exit_code=1,
        reason=record.reason.partition(":")[0],
        stopped_after_step=stopped_after,
        last_good_checkpoint=state.step,
        steps=config.steps,
    )
