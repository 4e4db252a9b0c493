"""What the first minutes of a model say: a delay in tokens, whatever made it, and nothing where runs do not compare."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab import figures, records, tables
from fp8lab.analysis import starts
from fp8lab.config import Recipe, ScheduleConfig
from fp8lab.frontpage import Evidence, lead
from fp8lab.schedule import decay_start
from tests.fixtures import SIZES, STEPS, write_early_records, write_run

WARM, STABLE_END = 6, decay_start(ScheduleConfig(kind="wsd", decay_fraction=0.2), STEPS)


def write_start(root: Path, recipe: Recipe, delay: float, slope: float = 1.3) -> Path:
    """A run whose loss falls by `slope` for every factor e in tokens, and lags `delay` times behind one without."""
    folder = write_run(root, "early-h200", SIZES[0], recipe, budget=1, device_name="NVIDIA H200")
    table = records.read_table(folder, "metrics")
    table["loss"] = 9 - slope * np.log(table["tokens"] / delay)
    # Neither the warm-up nor the decay may count.
    table.loc[(table["step"] <= WARM) | (table["step"] > STABLE_END), "loss"] = 0.0 if recipe == "bf16" else 20.0
    records.write_table(folder, "metrics", table)
    path = folder / "record.json"
    record = json.loads(path.read_text())
    record["config"]["schedule"]["warmup_fraction"] = WARM / STEPS
    path.write_text(json.dumps(record))
    return folder


def only_start(root: Path) -> starts.Start:
    (start,) = starts.starts(starts.early_runs(root))
    return start


@settings(max_examples=15, deadline=None)
@given(delay=st.floats(0.7, 1.5), slope=st.floats(0.2, 3))
def test_a_run_that_lags_takes_as_many_times_the_tokens_as_it_lags(
    tmp_path_factory: pytest.TempPathFactory, delay: float, slope: float
) -> None:
    root = tmp_path_factory.mktemp("early")
    write_start(root, "bf16", 1, slope)
    write_start(root, "fused", delay, slope)
    start = only_start(root)
    assert start.token_factor == pytest.approx(delay, rel=0.02)
    assert start.speed_ratio == pytest.approx(1)
    assert start.time_factor == pytest.approx(delay, rel=0.02)


def test_a_delay_that_grows_is_taken_at_the_lowest_loss_before_a_run_gets_worse_again(tmp_path: Path) -> None:
    write_start(tmp_path, "bf16", 1, slope=1.3)
    folder = write_start(tmp_path, "fused", 1)
    table = records.read_table(folder, "metrics")
    stable = table["step"].between(WARM + 1, STABLE_END)
    first = float(table.loc[stable, "tokens"].iloc[0])
    # Both begin alike; BF16's loss falls faster from there on.
    table.loc[stable, "loss"] = 9 - 1.3 * math.log(first) - 1.0 * np.log(table.loc[stable, "tokens"] / first)
    worse = table["step"].between(STABLE_END - 7, STABLE_END)
    lowest = table.loc[stable & ~worse, "tokens"].iloc[-1]
    table.loc[worse, "loss"] += 0.4
    records.write_table(folder, "metrics", table)
    expected = lowest / (first * (lowest / first) ** (1 / 1.3))
    assert expected > 1.3
    assert only_start(tmp_path).token_factor == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_a_loss_that_one_run_had_before_its_first_window_gives_no_factor(tmp_path: Path, shift: float) -> None:
    write_start(tmp_path, "bf16", 1)
    folder = write_start(tmp_path, "fused", 1)
    table = records.read_table(folder, "metrics")
    records.write_table(folder, "metrics", table.assign(loss=table["loss"] + shift))
    start = only_start(tmp_path)
    assert start.token_factor is None
    assert start.time_factor is None
    assert tables.runs.starts([start]).iloc[1]["tokens, × BF16"] == "–"


def test_losses_of_several_seeds_differ_by_the_gap_beside_them(tmp_path: Path) -> None:
    for recipe, seed in (("bf16", 1), ("bf16", 2), ("fused", 1), ("tensorwise", 2)):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, seed=seed, budget=1, device_name="NVIDIA H200")
    table = tables.runs.starts(starts.starts(starts.early_runs(tmp_path))).set_index("recipe")
    assert list(table.index) == ["bf16", "tensorwise", "fused"]
    losses = table["loss (nats/token)"].astype(float)
    for recipe in ("tensorwise", "fused"):
        assert losses[recipe] - losses["bf16"] == pytest.approx(float(table["− BF16"][recipe]), abs=1.5e-4)


def test_a_start_that_diverged_is_named_though_nothing_is_left_to_compare(tmp_path: Path) -> None:
    write_early_records(tmp_path)
    (path,) = tmp_path.glob("early-h200/*-fused-*/record.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"status": "diverged", "reason": "loss is NaN", "final": None}))
    assert starts.starts(starts.early_runs(tmp_path)) == []
    assert f"Diverged and in no gap: `{record['run']}`." in lead(Evidence.read(tmp_path))


def test_runs_of_one_seed_stand_beside_each_other_where_there_are_such(tmp_path: Path) -> None:
    for recipe, seed in (("bf16", 1), ("bf16", 3), ("bf16", 2), ("fused", 3), ("fused", 2)):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, seed=seed, budget=1, device_name="NVIDIA H200")
    start = only_start(tmp_path)
    assert (start.ours.record.seed, start.baseline.record.seed) == (2, 2)


def test_a_jump_in_the_first_steps_does_not_flatten_what_follows(tmp_path: Path) -> None:
    write_start(tmp_path, "bf16", 1)
    folder = write_start(tmp_path, "fused", 1.1)
    for recipe_folder in (folder, folder.with_name(folder.name.replace("fused", "bf16"))):
        table = records.read_table(recipe_folder, "metrics")
        table.loc[table["step"] > STABLE_END, "loss"] = 5.0
        table.loc[table["step"] <= WARM, "loss"] = 9.0
        table.loc[(table["step"] == 2) & ("fused" in recipe_folder.name), "loss"] = 13.0
        records.write_table(recipe_folder, "metrics", table)
    bottom = figures.loss.loss_curves(starts.early_runs(tmp_path), SIZES[0].name).axes[1]
    apart = 1.3 * math.log(1.1)
    assert apart < bottom.get_ylim()[1] < 1.5 * apart


def test_a_cosine_has_no_steps_at_its_highest_rate_to_compare(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        path = write_run(tmp_path, "early-h200", SIZES[0], recipe, budget=1, device_name="NVIDIA H200") / "record.json"
        record = json.loads(path.read_text())
        record["config"]["schedule"]["kind"] = "cosine"
        path.write_text(json.dumps(record))
    start = only_start(tmp_path)
    assert start.token_factor is None


def test_speed_and_memory_are_compared_between_runs_that_had_a_gpu_of_one_kind_to_themselves(tmp_path: Path) -> None:
    write_early_records(tmp_path)
    paths = {path.parent.name.split("-")[1]: path for path in tmp_path.glob("early-h200/*/record.json")}
    original = json.loads(paths["fused"].read_text())

    def with_fused(**changes: object) -> starts.Start:
        record = json.loads(json.dumps(original))
        for name, value in changes.items():
            record[name] |= value
        paths["fused"].write_text(json.dumps(record))
        return only_start(tmp_path)

    tokens_per_second = original["speed"]["tokens_per_second_median"]
    faster = {"tokens_per_second_median": 1.5 * tokens_per_second, "peak_memory_bytes": 10 * 2**30}
    start = with_fused(speed=faster)
    assert start.speed_ratio == pytest.approx(1.5)
    assert start.memory_ratio == pytest.approx(0.5)
    row = tables.runs.starts([start]).iloc[1]
    assert row["tokens/s"].endswith("(1.50)")
    assert row["GiB"] == "10.0 (0.50)"
    for elsewhere in ({"device_name": "NVIDIA H100"}, {"device_count": 2}, {"concurrent_runs": 2}):
        start = with_fused(provenance=elsewhere)
        assert start.speed_ratio is None
        assert start.memory_ratio is None
    assert with_fused(speed={"tokens_per_second_median": None}).speed_ratio is None
    paths["fused"].write_text(json.dumps(original | {"emulated": True}))
    assert only_start(tmp_path).speed_ratio is None


def test_the_first_page_says_what_fp8_does_to_a_start_and_nothing_where_none_was_trained(tmp_path: Path) -> None:
    write_run(tmp_path, "early-h200", SIZES[0], "bf16", budget=1, device_name="NVIDIA H200")
    assert "first minutes" not in lead(Evidence.read(tmp_path))
    write_start(tmp_path, "bf16", 1)
    write_start(tmp_path, "fused", 1.25)
    said = lead(Evidence.read(tmp_path))
    gap = only_start(tmp_path).gap
    losses = {path.parent.name.split("-")[1]: path for path in tmp_path.glob("early-h200/*/record.json")}
    ends = {recipe: json.loads(path.read_text())["final"]["validation_loss"] for recipe, path in losses.items()}
    assert gap.mean == pytest.approx(ends["fused"] - ends["bf16"])
    assert f"{gap.text('nats/token')} with `fused` at 0.4M, about 1.25 times BF16's tokens" in said


def test_a_start_on_a_cpu_is_no_measurement(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, budget=1)
    assert not starts.early_runs(tmp_path)
    assert starts.starts(starts.early_runs(tmp_path)) == []
