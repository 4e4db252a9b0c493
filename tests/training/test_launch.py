"""Starting ranks: what the launcher makes of their failures, and how it follows their record."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig

from fp8lab import records
from fp8lab.errors import UserError
from fp8lab.training import launch
from fp8lab.training.launch import Stopped
from tests.rule_data import tiny_config
from tests.test_records import metrics, started


def failed(folder: Path, **ranks: tuple[int, int, str]) -> ChildFailedError:
    """What torchrun raises. Of each rank: exit code, second of the error, and its text; without one it was killed."""
    failures = {}
    for rank, (code, second, text) in enumerate(ranks.values()):
        file = folder / f"error-{rank}.json"
        if text:
            file.write_text(json.dumps({"message": {"message": text, "extraInfo": {"timestamp": str(second)}}}))
        failures[rank] = ProcessFailure(local_rank=rank, pid=rank + 1, exitcode=code, error_file=str(file))
    return ChildFailedError("worker", failures)


LOST = (1, 7, "RuntimeError: Connection closed by peer")
TOLD = (2, 7, "PeerFailed: rank 1: micro_batch: 8 do not fit")


@pytest.mark.parametrize(
    ("ranks", "kind", "message"),
    [
        ({"a": LOST, "b": (1, 6, "ValueError: no such batch")}, RuntimeError, "rank 1: ValueError: no such batch"),
        # The first rank to be asked need not be the first to have failed.
        ({"a": TOLD, "b": (2, 9, "OutOfMemory: micro_batch: 8 do not fit")}, UserError, "micro_batch: 8 do not fit"),
        ({"a": TOLD}, UserError, "rank 1: micro_batch: 8 do not fit"),
        ({"a": (1, 7, "PeerFailed: rank 1: OSError: disk full")}, RuntimeError, "rank 1: OSError: disk full"),
        ({"a": LOST, "b": (-9, 0, "")}, RuntimeError, "rank 1: Signal 9 (SIGKILL) received by PID 2"),
        ({"a": (2, 7, "UserError: tokens: too few")}, UserError, "tokens: too few"),
        ({"a": (1, 7, "Diverged: 20 steps")}, RuntimeError, "rank 0: Diverged: 20 steps"),
        # The launcher ended the second while it was leaving.
        (
            {"a": (143, 7, "Interrupted: SIGTERM"), "b": (-15, 6, "Interrupted: SIGTERM")},
            Stopped,
            "SIGTERM before there was a checkpoint; the same command starts again",
        ),
    ],
)
def test_the_failure_told_is_the_cause(tmp_path: Path, ranks: dict, kind: type[Exception], message: str) -> None:
    told = launch._what_happened(failed(tmp_path, **ranks), tmp_path)
    assert type(told) is kind
    assert str(told) == message


def test_an_interruption_tells_from_which_checkpoint_the_run_goes_on(tmp_path: Path) -> None:
    for name in ("step-00000500", "step-00001000", ".step-00001500.tmp"):
        (tmp_path / name).mkdir()
    told = launch._what_happened(failed(tmp_path, a=(130, 7, "Interrupted: SIGINT after step 1500")), tmp_path)
    assert isinstance(told, Stopped)
    assert (told.exit_code, str(told)) == (130, "SIGINT; the same command resumes after step 1000")


@pytest.fixture
def signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[LaunchConfig, Stopped]]:
    """Launches a run whose launcher receives SIGTERM: what the ranks were started with, and what the user is told."""

    def run() -> tuple[LaunchConfig, Stopped]:
        started: list[LaunchConfig] = []

        def elastic_launch(settings: LaunchConfig, _command: str) -> Callable[..., None]:
            started.append(settings)

            def start(*_: str) -> None:
                raise SignalException("signal", sigval=signal.SIGTERM)

            return start

        monkeypatch.setattr(launch, "elastic_launch", elastic_launch)
        folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
        with pytest.raises(Stopped) as stopped:
            launch.launch(tiny_config(run="large"), 2, **folders)
        return started[0], stopped.value

    return run


def test_a_signal_that_comes_too_late_to_stop_a_run_is_no_interruption(tmp_path: Path, monkeypatch) -> None:
    record = started()
    record.plan, record.run = "test", "large"

    def elastic_launch(*_: object) -> Callable[..., None]:
        def start(*_: str) -> None:
            records.write(record, tmp_path / "records_dir")
            raise SignalException("signal", sigval=signal.SIGTERM)

        return start

    monkeypatch.setattr(launch, "elastic_launch", elastic_launch)
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    record.status = "running"
    with pytest.raises(Stopped):
        launch.launch(tiny_config(run="large"), 2, **folders)
    record.status = "finished"
    assert launch.launch(tiny_config(run="large"), 2, **folders) == record
    # Finished by an earlier attempt: nothing was done now.
    with pytest.raises(Stopped):
        launch.launch(tiny_config(run="large"), 2, **folders)


def test_a_launcher_that_takes_no_patience_is_given_none(monkeypatch) -> None:
    monkeypatch.setattr(launch, "LaunchConfig", dataclasses.make_dataclass("LaunchConfig", ["min_nodes"]))
    assert launch._patience() == {}


@pytest.mark.skipif(not launch._patience(), reason="this torch's launcher waits 30 s whatever it is told")
def test_ranks_have_minutes_for_the_checkpoint_that_a_signal_asks_for(signalled, monkeypatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert signalled()[0].shutdown_timeout >= 300
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
    assert signalled()[0].shutdown_timeout == 100


def test_a_signal_to_the_launcher_promises_what_there_is_to_resume(signalled, tmp_path: Path) -> None:
    assert "starts again" in str(signalled()[1])
    record = started()
    record.plan, record.run, record.steps = "test", "large", 712
    records.write(record, tmp_path / "records_dir")
    (tmp_path / "checkpoints_dir" / "test" / "large" / "step-00000500").mkdir()
    assert str(signalled()[1]) == "SIGTERM; the same command resumes after step 500"


def test_tables_are_followed_from_the_first_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WATCH_SECONDS", 0.01)
    folder, lengths = tmp_path / "record", []

    def write(rows: int) -> None:
        records.write_table(folder, "metrics", metrics(rows))
        records.write_table(folder, "validation", pd.DataFrame(columns=list(records.COLUMNS["validation"])))

    def on_log(read_metrics, read_validation) -> None:
        assert read_validation().empty
        lengths.append(len(read_metrics()))

    with launch._watched(folder, on_log):
        time.sleep(0.03)
        write(1)
        while lengths != [1]:
            time.sleep(0.01)
        # In the middle of being replaced.
        (folder / "metrics.parquet").unlink()
        records.write_table(folder, "validation", pd.DataFrame(columns=list(records.COLUMNS["validation"])))
        time.sleep(0.03)
        write(3)
    assert lengths[-1] == 3
