"""Which measurements of speed the article draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8lab.analysis.occasions import speed_runs
from tests.fixtures import write_speed_records


@pytest.mark.parametrize("change", [{"emulated": True}, {"status": "failed"}])
def test_emulated_or_failed_measurements_of_speed_are_never_shown(tmp_path: Path, change: dict) -> None:
    folder = write_speed_records(tmp_path)
    assert len(speed_runs(tmp_path)) == 1
    record = json.loads((folder / "record.json").read_text())
    record["results"] |= {key: value for key, value in change.items() if key == "emulated"}
    record |= {key: value for key, value in change.items() if key == "status"}
    (folder / "record.json").write_text(json.dumps(record))
    assert speed_runs(tmp_path) == []


def test_what_could_not_be_timed_is_named_with_its_error(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    (speed,) = speed_runs(tmp_path)
    assert speed.failures() == {"1.5B-T2048-B16, rowwise-head_fp8": "OutOfMemoryError: tried to allocate 12 GiB"}
