"""The run record: what is written can be read, and what is damaged is refused by name."""

from __future__ import annotations

import ast
import json
import math
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import provenance, records
from fp8lab.config import MODELS, OptimizerConfig, RunConfig
from fp8lab.errors import UserError
from fp8lab.provenance import collect_provenance

CONFIG = RunConfig(
    plan="p",
    run="r",
    model=MODELS["7M"],
    recipe="bf16",
    seed=1,
    mixture="demo",
    tokens=4096,
    global_batch_tokens=2048,
    micro_batch=2,
    optimizer=OptimizerConfig(peak_learning_rate=1e-3),
)


def started() -> records.TrainRecord:
    return records.started(CONFIG, collect_provenance("CPU"), emulated=False)


def test_provenance_says_which_kernels_a_commit_has_whatever_is_said_about_them(monkeypatch, tmp_path) -> None:
    def version(changes: dict[str, str]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "kernels"
        shutil.copytree(Path(records.__file__).parent / "kernels", folder)
        for module, text in changes.items():
            (folder / module).write_text((folder / module).read_text() + text)
        monkeypatch.setattr(provenance, "__file__", str(folder.parent / "provenance.py"))
        found = collect_provenance("CPU").versions[records.KERNELS]
        monkeypatch.undo()
        return found

    today = collect_provenance("CPU").versions[records.KERNELS]
    assert version({"triton_ops.py": '\n# A comment.\n"""And a word."""\n', "benchmark.py": "TIMED = 1\n"}) == today
    assert version({"block.py": "\nANOTHER = 1\n"}) != today


def test_the_kernels_version_is_the_same_under_every_python() -> None:
    # What Python 3.12 and later make of an f-string, which 3.11 takes for one token.
    source = b'def f(x):\n    """Doc."""\n    raise Error(f"{x} rows: {y}.")  # why\n'
    raised = 'raise Error ( f" { x }  rows:  { y } . " )'
    assert provenance._code(source) == f"def f ( x ) :      {raised} "
    # Others are taken apart in more ways.
    for module in provenance._KERNEL_MODULES:
        path = Path(provenance.__file__).parent / "kernels" / f"{module}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FormattedValue):
                simple = isinstance(node.value, ast.Name) and node.conversion == -1 and node.format_spec is None
                assert simple, f"{path.name}: line {node.lineno}"
        assert not re.search(r"""\b(rf|fr)["']""", path.read_text(), re.IGNORECASE), path.name


def test_the_commit_is_that_of_the_code_and_not_of_the_folder_that_it_is_used_from(tmp_path, monkeypatch) -> None:
    here = provenance._git_state()
    monkeypatch.chdir(tmp_path)
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "Other"]):
        subprocess.run(["git", *arguments], check=True)
    assert provenance._git_state() == here


def metrics(rows: int = 3) -> pd.DataFrame:
    return pd.DataFrame({column: range(rows) for column in records.COLUMNS["metrics"]})


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    record = started()
    folder = records.write(record, tmp_path)
    assert folder == tmp_path / "p" / "r"
    assert records.read(folder) == record
    assert RunConfig.model_validate(record.config) == CONFIG
    assert [found for _, found in records.read_plan(tmp_path, "p")] == [record]


def test_a_record_that_does_not_say_how_many_losses_were_judged_leaves_it_unknown(tmp_path: Path) -> None:
    record = started()
    record.stability = records.Stability(
        spike_score=0.0, judged_steps=7, skipped_steps=0, first_bad_step=None, first_bad_layer=None
    )
    path = records.write(record, tmp_path) / "record.json"
    values = json.loads(path.read_text())
    assert values["stability"].pop("judged_steps") == 7
    path.write_text(json.dumps(values))
    older = records.read(path.parent)
    assert isinstance(older, records.TrainRecord)
    assert older.stability is not None
    assert older.stability.judged_steps is None


def test_only_complete_files_are_left_behind(tmp_path: Path) -> None:
    folder = records.write(started(), tmp_path)
    records.write_table(folder, "metrics", metrics())
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.parquet", "record.json"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_record_that_could_not_be_read_is_not_written(tmp_path: Path, value: float) -> None:
    record = started()
    folder = records.write(record, tmp_path)
    broken = record.model_copy(deep=True)
    broken.stability = records.Stability(spike_score=value, skipped_steps=0, first_bad_step=None, first_bad_layer=None)
    with pytest.raises(ValueError, match=r"p/r/record\.json: train\.stability\.spike_score: .* not finite"):
        records.write(broken, tmp_path)
    assert records.read(folder) == record
    assert [path.name for path in folder.iterdir()] == ["record.json"]


def test_markup_is_refused_before_there_is_a_record_of_it_and_patterns_are_none(tmp_path: Path) -> None:
    record = started()
    record.config |= {"mixture": "mixtures/[mine].yaml", "high_precision": ["blocks.[01].*"]}
    with pytest.raises(UserError, match=r"config\.mixture: .*markup"):
        records.write(record, tmp_path)
    assert not (tmp_path / "p" / "r" / "record.json").exists()
    record.config["mixture"] = "mine"
    assert records.read(records.write(record, tmp_path)) == record


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_a_truncated_record_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = records.write(started(), tmp_path) / "record.json"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"p/r/record\.json: truncated"):
        records.read(path.parent)


@pytest.mark.parametrize(
    ("field", "value"),
    [("recipe", "fp9"), ("status", "done"), ("tokens", None), ("surprise", 1), ("schema", 2), ("plan", "../x")],
)
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    path = records.write(started(), tmp_path) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf"record\.json: (train\.)?{field}"):
        records.read(path.parent)


@pytest.mark.parametrize("field", ["validation_loss", "bits_per_byte"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_final_loss_that_is_not_finite_is_refused_by_name(tmp_path: Path, field: str, value: str) -> None:
    record = started()
    record.final = records.FinalLosses(train_loss=3.0, validation_loss=3.0, bits_per_byte=3.0, by_domain={})
    path = records.write(record, tmp_path) / "record.json"
    path.write_text(path.read_text().replace(f'"{field}": 3.0', f'"{field}": {value}'))
    with pytest.raises(UserError, match=rf"p/r/record\.json: train\.final\.{field}: .* finite"):
        records.read(path.parent)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.parquet: missing column loss"):
        records.write_table(tmp_path, "metrics", metrics().drop(columns="loss"))
    metrics().drop(columns="loss").to_parquet(tmp_path / "metrics.parquet")
    with pytest.raises(UserError, match=r"metrics\.parquet: missing column loss"):
        records.read_table(tmp_path, "metrics")


def test_a_truncated_table_is_refused_by_name(tmp_path: Path) -> None:
    records.write_table(tmp_path, "metrics", metrics())
    path = tmp_path / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"metrics\.parquet: truncated"):
        records.read_table(tmp_path, "metrics")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["record.json", "metrics.parquet", "eval.json"])
def test_a_pickle_in_place_of_a_record_executes_nothing(tmp_path: Path, name: str) -> None:
    target = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(target)))
    readers = {
        "record.json": lambda: records.read(tmp_path),
        "metrics.parquet": lambda: records.read_table(tmp_path, "metrics"),
        "eval.json": lambda: records.read_eval(tmp_path),
    }
    with pytest.raises(UserError, match=name):
        readers[name]()
    assert not target.exists()
