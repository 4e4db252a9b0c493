"""Which runs the article draws, and the differences that it reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fp8lab.analysis.composition import data_record
from fp8lab.analysis.runs import (
    DEMO_COMMAND,
    LADDER_COMMAND,
    RunSet,
    has_ladder,
    outdated_runs,
    plan_runs,
    seed_deviation,
    training_command,
    training_runs,
)
from fp8lab.errors import UserError
from tests.fixtures import (
    SIZES,
    write_demo_records,
    write_gpu_records,
    write_ladder_records,
    write_run,
)


def test_runs_of_a_gpu_replace_the_demos_and_are_never_mixed_with_them(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    assert training_runs(tmp_path).toy
    assert training_runs(tmp_path).source == "Toy scale, CPU."
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "ladder-h200", SIZES[0], recipe, device_name="NVIDIA H200")
    runs = training_runs(tmp_path)
    assert (runs.plan, runs.toy, runs.source) == ("ladder-h200", False, "Measured on NVIDIA H200.")
    assert {run.record.provenance.device_name for run in runs.runs} == {"NVIDIA H200"}


def test_what_a_chapter_lacks_beside_runs_of_a_gpu_is_never_filled_with_the_demos(tmp_path: Path) -> None:
    assert training_command(tmp_path) == DEMO_COMMAND
    write_demo_records(tmp_path)
    assert training_runs(tmp_path, suits=lambda runs: len(runs.sizes) > 2).toy
    assert training_command(tmp_path) == DEMO_COMMAND
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "pilot-h200", SIZES[0], recipe, device_name="NVIDIA H200")
    assert not training_runs(tmp_path, suits=lambda runs: len(runs.sizes) > 2)
    assert training_command(tmp_path) == LADDER_COMMAND


def test_runs_from_before_a_plan_got_another_tokenizer_are_left_out_and_named(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    assert outdated_runs(tmp_path) == []
    names = {run.record.run for run in plan_runs(tmp_path, "demo").runs}
    older = tmp_path / "demo" / "0.2M-bf16-s1"
    shutil.copytree(tmp_path / "demo" / min(names), older)
    record = json.loads((older / "record.json").read_text())
    record["run"] = older.name
    record["config"]["mixture"] = f"runs/mixtures/{record['config']['mixture']}.yaml"
    record["provenance"] |= {"tokenizer_sha256": "0" * 64, "started_utc": "2020-01-01T00:00:00+00:00"}
    (older / "record.json").write_text(json.dumps(record))
    assert outdated_runs(tmp_path) == ["demo/0.2M-bf16-s1"]
    assert {run.record.run for run in plan_runs(tmp_path, "demo").runs} == names
    # A later run that has not finished makes none of the others outdated.
    record["provenance"]["started_utc"] = "2030-01-01T00:00:00+00:00"
    for status in ("running", "failed"):
        (older / "record.json").write_text(json.dumps(record | {"status": status}))
        assert outdated_runs(tmp_path) == ["demo/0.2M-bf16-s1"]
        assert {run.record.run for run in plan_runs(tmp_path, "demo").runs} == names


def test_a_plan_with_one_precision_is_no_comparison(tmp_path: Path) -> None:
    write_run(tmp_path, "article", SIZES[0], "bf16", device_name="NVIDIA H200")
    write_demo_records(tmp_path)
    assert training_runs(tmp_path).plan == "demo"


def test_an_unfinished_run_is_left_out_and_named(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    path = tmp_path / "demo" / "0.4M-tensorwise-s1" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged"}))
    runs = plan_runs(tmp_path, "demo")
    assert [run.record.run for run in runs.unfinished] == ["0.4M-tensorwise-s1"]
    assert "0.4M-tensorwise-s1" not in [run.record.run for run in runs.runs]


def test_a_branch_that_did_not_finish_is_kept_apart_from_those_that_did(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    path = tmp_path / "ladder-h200" / "7M-fused-s1-d5" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged"}))
    runs = plan_runs(tmp_path, "ladder-h200")
    assert [run.record.run for run in runs.unfinished_branches] == [path.parent.name]
    assert path.parent.name not in [run.record.run for run in runs.branches]


def test_runs_are_in_order_of_size_and_recipe(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    runs = training_runs(tmp_path)
    assert runs.sizes == [model.name for model in SIZES]
    assert runs.recipes == ["bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp"]


def test_branches_are_no_runs_of_their_own(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    runs = training_runs(tmp_path)
    assert (len(runs.runs), len(runs.branches)) == (15, 30)
    assert all(run.record.parent is None for run in runs.runs)
    assert {run.record.parent.run for run in runs.branches if run.record.parent} == {
        run.record.run for run in runs.runs
    }


def test_runs_that_differ_in_more_than_their_seed_are_never_taken_for_one_another(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "a", SIZES[0], recipe, seed=1)
    assert plan_runs(tmp_path, "a").gap("0.4M", "fused").seeds == 1

    def with_another(name: str, **changes: object) -> RunSet:
        source = json.loads((tmp_path / "a" / "0.4M-fused-s1" / "record.json").read_text())
        folder = tmp_path / "a" / name
        shutil.copytree(tmp_path / "a" / "0.4M-fused-s1", folder)
        (folder / "record.json").write_text(json.dumps(source | {"run": name} | changes))
        runs = plan_runs(tmp_path, "a")
        shutil.rmtree(folder)
        return runs

    for name, changes in {
        "0.4M-fused-head_fp8-s1": {"head": "fp8"},
        "0.4M-fused-s2": {"seed": 2, "tokens": 1},
        "0.4M-fused-s1-low-rate": {},
    }.items():
        with pytest.raises(UserError, match="differ in more than their seed"):
            with_another(name, **changes).gap("0.4M", "fused")
    bf16 = json.loads((tmp_path / "a" / "0.4M-bf16-s1" / "record.json").read_text())
    for other in ({"data_sha256": "f" * 64}, {"epochs": {"edu": 0.123}}):
        path = tmp_path / "a" / "0.4M-bf16-s1" / "record.json"
        path.write_text(json.dumps(bf16 | {"provenance": bf16["provenance"] | other}))
        with pytest.raises(UserError, match="differ in data"):
            plan_runs(tmp_path, "a").gap("0.4M", "fused")
        path.write_text(json.dumps(bf16 | {"provenance": bf16["provenance"] | dict.fromkeys(other)}))
        assert plan_runs(tmp_path, "a").gap("0.4M", "fused").seeds == 1, "not known of both"
    (tmp_path / "a" / "0.4M-bf16-s1" / "record.json").write_text(json.dumps(bf16))
    twice = with_another("0.4M-fused-s1 ", run="0.4M-fused-s1")
    with pytest.raises(UserError, match="differ in nothing but their name"):
        twice.gap("0.4M", "fused")
    apart = with_another("0.4M-fused-s2-low-rate", seed=2)
    assert seed_deviation([apart], apart.runs[0]) is None


def test_a_validation_curve_ends_at_the_records_validation_loss(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    runs = training_runs(tmp_path)
    data = data_record(tmp_path, runs)
    assert data is not None
    weights = {domain: values["weight"] for domain, values in data.config["domains"].items()}
    for run in runs.runs:
        curve = run.validation_curve(weights)
        assert curve.iloc[-1] == pytest.approx(run.validation_loss)
        assert curve.index[-1] == run.record.tokens


def test_a_ladder_has_bf16_at_three_sizes(tmp_path: Path) -> None:
    write_gpu_records(tmp_path, sizes=SIZES)
    runs = plan_runs(tmp_path, "pilot-h200")
    assert has_ladder(runs)
    for path in tmp_path.glob(f"pilot-h200/{SIZES[0].name}-bf16-*"):
        shutil.rmtree(path)
    few = plan_runs(tmp_path, "pilot-h200")
    assert len(few.sizes) > 2
    assert not has_ladder(few)
