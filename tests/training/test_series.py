"""Runs that train one after another in one process, on tokens made by a rule."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch._dynamo.utils import counters

from fp8lab import records
from fp8lab.analysis.runs import plan_runs
from fp8lab.config import RunConfig
from fp8lab.records import TrainRecord
from fp8lab.training import compilation, session, trainer
from fp8lab.training.series import train_series
from fp8lab.training.signals import Interrupted
from tests import rule_data
from tests.rule_data import tiny_config, tiny_model
from tests.training.test_trainer import poison, stop_at


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)


def seeds(*numbers: int, **changes: object) -> list[RunConfig]:
    return [tiny_config(run=f"s{seed}", seed=seed, compact=True, average_half_life=0.1, **changes) for seed in numbers]


def run_series(root: Path, configs: list[RunConfig]) -> list[TrainRecord]:
    """The records in the order in which the runs ended."""
    ended: list[TrainRecord] = []
    folders = {name: root / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    train_series(configs, **folders, on_end=ended.append)
    return ended


def curves(root: Path) -> pd.DataFrame:
    table = records.read_table(root / "records_dir" / "test", "metrics")
    return table[["run", "step", "tokens", "loss", "lr", "grad_norm", "skipped"]]


def test_each_run_has_its_record_and_all_share_their_tables(tmp_path: Path) -> None:
    ended = run_series(tmp_path, seeds(1, 2, 3, log_interval=5, health_interval=10))
    assert [record.status for record in ended] == ["finished"] * 3
    plan = tmp_path / "records_dir" / "test"
    assert sorted(str(path.relative_to(plan)) for path in plan.rglob("*") if path.is_file()) == [
        "health.parquet",
        "metrics.parquet",
        "s1/record.json",
        "s2/record.json",
        "s3/record.json",
        "validation.parquet",
    ]
    left = {path.suffix for path in (tmp_path / "checkpoints_dir").rglob("*") if path.is_file()}
    assert ".safetensors" not in left
    runs = plan_runs(tmp_path / "records_dir", "test").runs
    assert [run.metrics["step"].tolist() for run in runs] == [[5, 10, 15, 20]] * 3
    assert [run.health["step"].unique().tolist() for run in runs] == [[10, 20]] * 3
    assert len({run.metrics["loss"].iloc[-1] for run in runs}) == 3
    for run in runs:
        last = run.validation.set_index("domain")["loss"]
        assert run.validation_loss == pytest.approx(0.75 * last["odd"] + 0.25 * last["even"])
        assert run.record.final is not None
        assert run.record.final.averaged is not None


def test_a_series_gives_the_numbers_of_runs_by_themselves(tmp_path: Path) -> None:
    run_series(tmp_path / "series", seeds(1, 2))
    for config in seeds(1, 2):
        run_series(tmp_path / "alone", [config])
    pd.testing.assert_frame_equal(curves(tmp_path / "series"), curves(tmp_path / "alone"), check_exact=True)


def test_a_run_that_fails_stops_no_other(tmp_path: Path) -> None:
    changes = {"model": tiny_model(seq_len=30), "tokens": 600, "global_batch_tokens": 30, "micro_batch": 1}
    impossible = tiny_config(run="odd", compact=True, recipe="tensorwise", **changes)
    ended = run_series(tmp_path, [*seeds(1), impossible, *seeds(2)])
    assert [(record.run, record.status) for record in ended] == [
        ("s1", "finished"),
        ("odd", "failed"),
        ("s2", "finished"),
    ]
    assert "multiple of 16" in (ended[1].reason or "")


def test_a_run_that_diverges_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, set(range(100)))
        assert [record.status for record in run_series(tmp_path, seeds(1, tokens=60 * 128))] == ["diverged"]
    assert [record.status for record in run_series(tmp_path, seeds(2))] == ["finished"]


def test_a_signal_keeps_what_is_finished_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_series(tmp_path / "whole", seeds(1, 2, 3))
    real = session.Session.take_step
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        stopping = session.Session.take_step
        patch.setattr(
            session.Session, "take_step", lambda self, batch: (stopping if self.config.seed == 2 else real)(self, batch)
        )
        with pytest.raises(Interrupted):
            run_series(tmp_path / "parts", seeds(1, 2, 3))
    plan = tmp_path / "parts" / "records_dir" / "test"
    statuses = {path.parent.name: records.read(path.parent).status for path in plan.glob("*/record.json")}
    assert statuses == {"s1": "finished", "s2": "interrupted"}
    before = (plan / "s1" / "record.json").read_bytes()
    ended = run_series(tmp_path / "parts", seeds(1, 2, 3))
    assert [record.status for record in ended] == ["finished"] * 3
    assert (plan / "s1" / "record.json").read_bytes() == before
    pd.testing.assert_frame_equal(curves(tmp_path / "whole"), curves(tmp_path / "parts"), check_exact=True)
    for seed in (1, 2, 3):
        finals = [
            records.read(tmp_path / root / "records_dir" / "test" / f"s{seed}").final  # type: ignore[union-attr]
            for root in ("whole", "parts")
        ]
        assert finals[0] == finals[1]


def test_a_signal_too_late_to_stop_a_run_stops_the_series_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = session.Session.validate

    def validate(self):
        if self.config.seed == 2:
            signal.raise_signal(signal.SIGTERM)
        real(self)

    monkeypatch.setattr(session.Session, "validate", validate)
    with pytest.raises(Interrupted) as stopped:
        run_series(tmp_path, seeds(1, 2, 3, tokens=2 * 128))
    assert stopped.value.exit_code == 143
    plan = tmp_path / "records_dir" / "test"
    statuses = {path.parent.name: records.read(path.parent).status for path in plan.glob("*/record.json")}
    assert statuses == {"s1": "finished", "s2": "finished"}
    assert set(curves(tmp_path)["run"]) == {"s1", "s2"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # With nothing left to train, there is nothing to interrupt.
    assert [record.status for record in run_series(tmp_path, seeds(2, tokens=2 * 128))] == ["finished"]


def test_processes_may_share_tables_at_once(tmp_path: Path) -> None:
    columns = {"metrics": records.COLUMNS["metrics"], "validation": records.COLUMNS["validation"]}
    names = [f"run{number}" for number in range(12)]
    for number, name in enumerate(names):
        (tmp_path / "p" / name).mkdir(parents=True)
        for table, fields in columns.items():
            rows = pd.DataFrame({field: [float(number)] * 3 for field in fields})
            records.write_table(tmp_path / "p" / name, table, rows)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: records.share_tables(tmp_path, "p", name), names))
    for table in columns:
        shared = records.read_table(tmp_path / "p", table)
        assert sorted(shared["run"]) == sorted(names * 3)
        assert all(float(row["run"][3:]) == row["step"] for _, row in shared.iterrows())
        assert not list((tmp_path / "p").glob(f"*/{table}.parquet"))


def own_tables(records_dir: Path, run: str, value: float, names: Sequence[str]) -> None:
    """Give a run tables of its own with `value` in every column."""
    (records_dir / "p" / run).mkdir(parents=True, exist_ok=True)
    for name in names:
        rows = pd.DataFrame({column: [value] * 3 for column in records.COLUMNS[name]})
        records.write_table(records_dir / "p" / run, name, rows)


def shared_values(records_dir: Path, name: str) -> dict[str, float]:
    """The value of each run's rows in a shared table."""
    table = records.read_table(records_dir / "p", name)
    return {run: rows["step"].unique().item() for run, rows in table.groupby("run")}


def test_shared_tables_hold_the_last_attempt_alone(tmp_path: Path) -> None:
    for run, value in (("a", 1.0), ("b", 2.0)):
        own_tables(tmp_path, run, value, records.TRAINING_TABLES)
        records.share_tables(tmp_path, "p", run)
    own_tables(tmp_path, "a", 3.0, ["metrics", "validation"])
    records.share_tables(tmp_path, "p", "a")
    assert shared_values(tmp_path, "metrics") == shared_values(tmp_path, "validation") == {"a": 3.0, "b": 2.0}
    assert shared_values(tmp_path, "health") == {"b": 2.0}
    # Shared already: alone, or with what a process left that died between sharing and removing its own.
    for left in ([], ["validation"]):
        own_tables(tmp_path, "b", 2.0, left)
        records.share_tables(tmp_path, "p", "b")
        assert [shared_values(tmp_path, name)["b"] for name in records.TRAINING_TABLES] == [2.0] * 3
        assert not list((tmp_path / "p" / "b").iterdir())
    records.drop_shared_rows(tmp_path, "p", "b")
    assert shared_values(tmp_path, "metrics") == {"a": 3.0}
    assert shared_values(tmp_path, "health") == {}


def test_runs_that_differ_in_seed_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_compiled_for", "")
    real, compiled = torch.nn.Module.compile, []
    # What is compiled is Dynamo's to decide; into what, takes most of the time.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="eager", **options))

    def on_end(record: TrainRecord) -> None:
        assert record.status == "finished"
        compiled.append(counters["stats"]["unique_graphs"])

    changes = {"compile": True, "tokens": 2 * 128, "model": tiny_model(n_layers=1)}
    configs = [*seeds(1, 2, **changes), *seeds(3, 4, recipe="fused", **changes)]
    counters.clear()
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    train_series(configs, **folders, on_end=on_end)
    bf16, fused = compiled[0], compiled[2]
    assert 0 < bf16 < fused
    assert compiled == [bf16, bf16, fused, fused]
