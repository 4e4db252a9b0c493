"""The command line as a user meets it: exit codes, one-line errors, help with units."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fp8lab import cli
from tests.fixtures import SIZES, write_run
from tests.test_plan import ENTRY, write_plan


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


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"high_precision": ["nothing.*"], "recipes": ["tensorwise"]}, [], "nothing.*"),
        ({}, ["--nproc=3"], "not a multiple of processes"),
    ],
)
def test_what_no_run_could_train_is_refused_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    changes: dict[str, object],
    options: list[str],
    named: str,
) -> None:
    plan = write_plan(tmp_path, ENTRY | changes)
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "data", "checkpoints")]
    assert fp8lab(monkeypatch, "run", str(plan), *more, *options, *folders) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "-s1: " in error, "the run's name"
    assert list(tmp_path.iterdir()) == [plan]


def test_a_file_where_a_folder_should_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cli, "app", lambda: (tmp_path / "file" / "x").mkdir())
    assert fp8lab(monkeypatch, "status") == 2
    assert capsys.readouterr().err == f"fp8lab: {tmp_path / 'file' / 'x'}: Not a directory\n"


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


def failed_run(records_dir: Path, reason: str) -> None:
    folder = write_run(records_dir, "demo", SIZES[0], "bf16")
    values = json.loads((folder / "record.json").read_text())
    values |= {"status": "failed", "final": None, "reason": reason}
    (folder / "record.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "reason", ["RuntimeError: x [/usr/lib/libcuda.so]", "ValueError: [red]expected[/red] list[int]"]
)
def test_status_quotes_an_error_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    monkeypatch.setattr(cli.console, "_width", 400)
    failed_run(tmp_path, reason)
    assert fp8lab(monkeypatch, "status", f"--records-dir={tmp_path}") == 0
    assert reason in capsys.readouterr().out


def test_status_lets_no_record_command_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.console, "_width", 400)
    failed_run(tmp_path, "RuntimeError: \x1b]0;title\x07 \x1b[2J")
    assert fp8lab(monkeypatch, "status", f"--records-dir={tmp_path}") == 0
    output = capsys.readouterr().out
    assert "RuntimeError" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("command", ["status", "publish"])
def test_a_mistyped_folder_of_records_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert fp8lab(monkeypatch, command, f"--records-dir={tmp_path / 'typo'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "typo") in error


def test_status_of_a_new_project_says_how_to_make_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fp8lab(monkeypatch, "status") == 0
    assert "fp8lab run runs/plans/demo.yaml" in capsys.readouterr().out


def test_a_record_nested_too_deeply_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path, "demo", SIZES[0], "bf16")
    (folder / "record.json").write_text("[" * 100_000)
    assert fp8lab(monkeypatch, "status", f"--records-dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "record.json: nested too deeply" in error


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, ["--mixture=nothere"], "nothere"),
        ({"tokens_per_parameter": 1e300}, [], "tokens_per_parameter"),
        ({"tokens": 10**400}, [], "tokens"),
    ],
)
def test_a_dry_run_refuses_what_could_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict,
    options: list[str],
    says: str,
) -> None:
    entry = {field: value for field, value in ENTRY.items() if not (change and field.startswith("tokens"))}
    assert fp8lab(monkeypatch, "run", str(write_plan(tmp_path, entry | change)), "--dry-run", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize(
    "arguments", [("publish", "--site-dir={file}/site"), ("data", "tokenizer", "demo", "--to={file}/folder/ranks")]
)
def test_a_folder_that_cannot_be_made_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert fp8lab(monkeypatch, *(argument.format(file=file) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error


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
