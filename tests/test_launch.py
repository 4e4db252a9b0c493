"""Starting ranks: what the launcher makes of their failures, and how it follows their record."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fp8lab import launch, records
from fp8lab.errors import UserError
from fp8lab.trainer import Interrupted
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
            Interrupted,
            "SIGTERM after step 0; the same command resumes",
        ),
        ({"a": (143, 7, "Interrupted: SIGTERM")}, Interrupted, "SIGTERM after step 0; the same command resumes"),
    ],
)
def test_the_failure_told_is_the_cause(tmp_path: Path, ranks: dict, kind: type[Exception], message: str) -> None:
    told = launch._what_happened(failed(tmp_path, **ranks), tmp_path)
    assert type(told) is kind
    assert str(told) == message


def test_an_interruption_tells_how_far_the_run_had_come(tmp_path: Path) -> None:
    record = started()
    record.steps = 12
    folder = records.write(record, tmp_path)
    told = launch._what_happened(failed(tmp_path, a=(130, 7, "Interrupted: SIGINT after step 12")), folder)
    assert isinstance(told, Interrupted)
    assert (told.exit_code, str(told)) == (130, "SIGINT after step 12; the same command resumes")


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
