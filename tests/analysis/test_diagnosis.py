"""Which layers a run's health says to keep in BF16, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import records, tables
from fp8lab.analysis import diagnosis
from fp8lab.analysis.runs import Run, plan_runs, training_runs
from fp8lab.config import Recipe
from tests.fixtures import SIZES, write_demo_records, write_run


def a_run(root: Path, recipe: Recipe = "tensorwise") -> Run:
    """A run of four blocks whose health is perfect."""
    folder = write_run(root, "demo", SIZES[0], recipe)
    table = records.read_table(folder, "health")
    better = {"underflow_fraction": 1e-5, "saturation_fraction": 0.0, "sqnr_db": 31.0}
    records.write_table(folder, "health", table.assign(**better))
    return plan_runs(root, "demo").runs[0]


def spoil(run: Run, layer: str, tensor: str, steps: slice, **values: float) -> Run:
    """The run with other values in some of its measurements of one tensor."""
    table = records.read_table(run.folder, "health")
    chosen = table.index[(table["layer"] == layer) & (table["tensor"] == tensor)][steps]
    for column, value in values.items():
        table.loc[chosen, column] = value
    records.write_table(run.folder, "health", table)
    return plan_runs(run.folder.parents[1], "demo").runs[0]


def test_a_healthy_run_has_nothing_to_keep_in_bf16(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert diagnosis.keep_in_bf16(run) == []
    assert tables.health.rounding_losses([run]).empty


@pytest.mark.parametrize(
    ("values", "reason", "worst"),
    [
        ({"underflow_fraction": 0.011}, "underflow", "1.1%"),
        ({"saturation_fraction": 2e-4}, "saturation", "0.02%"),
        ({"sqnr_db": 19.9}, "SQNR", "19.9 dB"),
    ],
)
def test_an_operand_past_a_limit_names_its_layer(tmp_path: Path, values: dict, reason: str, worst: str) -> None:
    run = spoil(a_run(tmp_path), "blocks.2.mlp.down", "grad_output", slice(None), **values)
    assert diagnosis.keep_in_bf16(run) == ["blocks.2.mlp.down"]
    (row,) = tables.health.rounding_losses([run]).to_dict("records")
    assert row == {
        "recipe": "tensorwise",
        "Linear": "down",
        "operand": "grad_output",
        "blocks": "2",
        "passes the limit of": reason,
        "worst": worst,
    }


def test_early_steps_and_one_bad_batch_do_not_decide(tmp_path: Path) -> None:
    # Of six measurements the last three count, by their median.
    run = spoil(a_run(tmp_path), "blocks.0.attention.qkv", "input", slice(0, 3), underflow_fraction=0.5)
    run = spoil(run, "blocks.1.attention.qkv", "input", slice(5, 6), underflow_fraction=0.5)
    assert diagnosis.keep_in_bf16(run) == []
    run = spoil(run, "blocks.1.attention.qkv", "input", slice(4, 6), underflow_fraction=0.5)
    assert diagnosis.keep_in_bf16(run) == ["blocks.1.attention.qkv"]


def test_fused_keeps_whole_blocks(tmp_path: Path) -> None:
    run = a_run(tmp_path, "fused")
    for layer in ("blocks.3.mlp.down", "blocks.3.mlp.gate_up", "blocks.0.attention.output"):
        run = spoil(run, layer, "weight", slice(None), sqnr_db=3.0)
    assert diagnosis.keep_in_bf16(run) == ["blocks.0.*", "blocks.3.*"]


def test_blocks_of_one_kind_share_a_row(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for block in (0, 1, 3):
        run = spoil(run, f"blocks.{block}.mlp.down", "input", slice(None), underflow_fraction=0.02 + 0.01 * block)
    (row,) = tables.health.rounding_losses([run]).to_dict("records")
    assert (row["blocks"], row["worst"]) == ("0-1, 3", "5%")


def test_growth_is_over_the_first_measurement(tmp_path: Path) -> None:
    run = spoil(a_run(tmp_path), "blocks.1.mlp.down", "input", slice(0, 1), amax=2.0)
    run = spoil(run, "blocks.1.mlp.down", "input", slice(1, None), amax=7.0)
    table = diagnosis.amax_growth(run)
    rows = table[(table["layer"] == "blocks.1.mlp.down") & (table["tensor"] == "input")]
    assert rows["growth"].tolist() == [1.0] + [3.5] * 5


def test_what_is_flushed_is_compared_by_recipe_and_size_without_bf16(tmp_path: Path) -> None:
    for size in SIZES[:2]:
        for recipe in ("bf16", "tensorwise", "fused"):
            write_run(tmp_path, "demo", size, recipe)
    runs = plan_runs(tmp_path, "demo")
    run = next(run for run in runs.runs if (run.recipe, run.size) == ("fused", SIZES[1].name))
    table = records.read_table(run.folder, "health")
    gradients = table["tensor"] == "grad_output"
    table.loc[gradients, ["underflow_fraction", "sqnr_db"]] = [0.02, 31.0]
    table.loc[gradients & (table["layer"] == "blocks.1.mlp.down"), ["underflow_fraction", "sqnr_db"]] = [0.3, 25.0]
    table.loc[table["tensor"] == "input", "underflow_fraction"] = 0.9
    table.loc[gradients, "scale"] = 448 / table["amax"] / 2**3
    table.loc[gradients & (table["layer"] == "blocks.2.mlp.down"), "scale"] /= 2**2.5
    records.write_table(run.folder, "health", table)
    found = tables.health.underflow_by_size(plan_runs(tmp_path, "demo"))
    assert list(zip(found["recipe"], found["model"], strict=True)) == [
        (recipe, size.name) for recipe in ("tensorwise", "fused") for size in SIZES[:2]
    ]
    assert found.iloc[-1].to_dict() == {
        "recipe": "fused",
        "model": SIZES[1].name,
        "gradients, most": "30%",
        "gradients, middle": "2%",
        "octaves unused": "3.0 to 5.5",
        "inputs, most": "90%",
        "SQNR (dB)": "25.0",
    }
    assert set(found[found["recipe"] == "tensorwise"]["octaves unused"]) == {"–"}


def test_octaves_are_left_unused_below_the_largest_number_of_the_gradients_own_format(tmp_path: Path) -> None:
    run = a_run(tmp_path, "fused")
    table = records.read_table(run.folder, "health")
    table["scale"] = 448 / table["amax"]
    records.write_table(run.folder, "health", table)
    path = run.folder / "record.json"
    seen = {}
    for gradient_format in ("e4m3", "e5m2"):
        record = json.loads(path.read_text())
        record["config"]["fused"]["gradient_format"] = gradient_format
        path.write_text(json.dumps(record))
        found = diagnosis.health(plan_runs(tmp_path, "demo").runs[0])
        assert found[found["tensor"] != "grad_output"]["unused_octaves"].isna().all()
        (seen[gradient_format],) = found[found["tensor"] == "grad_output"]["unused_octaves"].round(9).unique()
    assert seen == {"e4m3": 0.0, "e5m2": 7.0}


def test_counts_of_overflow_are_told_for_delayed_scales_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path, "fused")
    said = diagnosis.overflows(run)
    assert said is not None
    assert said.startswith("of the tensors of `fused`, ")
    assert "1 exceeded its scale at least once, most often `blocks.0.mlp.down input`, in 3 of 60 steps" in said
    assert "none lay below it" in said
    assert diagnosis.overflows(a_run(tmp_path / "other")) is None


def test_a_run_without_health_is_left_out(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    for path in (tmp_path / "demo").glob(f"{SIZES[-1].name}-*/health.parquet"):
        path.unlink()
    runs = training_runs(tmp_path)
    assert diagnosis.measured_sizes(runs) == [model.name for model in SIZES[:-1]]
    assert [run.recipe for run in diagnosis.measured(runs.where(size=runs.sizes[0]))] == runs.recipes
    assert isinstance(runs.where(size=runs.sizes[-1])[0].health, pd.DataFrame)
