"""The command line as a user meets it: exit codes, one-line errors, help with units."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fp8lab import cli
from tests.test_config import ENTRY, write_plan


def fp8lab(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fp8lab", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"micro_batch": 0.5}, "micro_batch"),
        ({"precision": "fp8"}, "precision: unknown field; accepted: models, recipes"),
        ({"recipes": ["fp9"]}, "'rowwise_with_gw_hp' or 'fused'"),
        ({"mixture": "no-such-mixture"}, "no-such-mixture"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict, says: str
) -> None:
    plan = write_plan(tmp_path, ENTRY | change)
    folders = [tmp_path / name for name in ("records", "data", "checkpoints")]
    options = [f"--{folder.name}-dir={folder}" for folder in folders]
    assert fp8lab(monkeypatch, "run", str(plan), *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not any(folder.exists() for folder in folders)


def test_a_missing_corpus_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere"
    monkeypatch.setenv("FP8LAB_CORPUS", str(missing))
    plan = write_plan(tmp_path, ENTRY | {"mixture": "local"})
    folders = [f"--eval-data={tmp_path}", f"--data-dir={tmp_path / 'data'}"]
    assert fp8lab(monkeypatch, "run", str(plan), *folders) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(missing) in error


def test_a_dry_run_prints_what_the_plan_costs_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.console, "_width", 400)
    options = [f"--records-dir={tmp_path / 'records'}", f"--data-dir={tmp_path / 'data'}"]
    assert fp8lab(monkeypatch, "run", "--dry-run", "runs/plans/article.yaml", *options) == 0
    output = capsys.readouterr().out
    for expected in (
        "1.5B-fused-s1",
        "123,588,864",
        "30,000,000,000",
        "Planned, not measured",
        "FLOPs, 6·N",
        "8 H100s",
    ):
        assert expected in output
    assert not list(tmp_path.iterdir())


def test_an_occasion_cannot_leave_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "data", "checkpoints")]
    assert fp8lab(monkeypatch, "speed", "runs/plans/speed-h200.yaml", "--occasion=../../x", *folders) == 2
    assert "--occasion" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["demo/none", "../../etc", "demo/../../x"])
def test_a_run_that_does_not_exist_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    assert fp8lab(monkeypatch, "generate", run, "--prompt=a", f"--checkpoints-dir={tmp_path}") == 2
    assert "no trained run of that name" in capsys.readouterr().err


def test_status_of_a_plan_that_never_ran_lists_its_runs_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, ENTRY)
    assert fp8lab(monkeypatch, "status", str(plan), f"--records-dir={tmp_path}") == 0
    assert capsys.readouterr().out.count("to do") == len(yaml.safe_load(plan.read_text())["entries"][0]["seeds"]) * 2


def test_doctor_says_whether_fp8_is_emulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.console, "_width", 400)
    assert fp8lab(monkeypatch, "doctor") == 0
    output = capsys.readouterr().out
    assert "FP8" in output
    assert "torch 2." in output


@pytest.mark.parametrize(
    ("command", "unit"),
    [("run", "GB"), ("status", "tokens/s"), ("generate", "Tokens to write"), ("data build", "Worker processes")],
)
def test_help_names_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, unit: str
) -> None:
    assert fp8lab(monkeypatch, *command.split(), "--help") == 0
    assert unit in " ".join(capsys.readouterr().out.split())
