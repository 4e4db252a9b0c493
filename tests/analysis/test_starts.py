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
from fp8lab.analysis import diagnosis, starts
from fp8lab.config import Recipe, ScheduleConfig
from fp8lab.frontpage import Evidence, conclusions, costs
from fp8lab.schedule import decay_start
from fp8lab.units import signed, small_percent
from tests.fixtures import SIZES, STEPS, write_early_change, write_early_records, write_run

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
    (start,) = (start for start in starts.starts(starts.early_runs(root)) if not start.ours.changes)
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


def test_every_run_stands_beside_bf16_of_its_own_seed(tmp_path: Path) -> None:
    for recipe, seed in (("bf16", 1), ("bf16", 2), ("fused", 1), ("fused", 2), ("tensorwise", 2), ("fused", 3)):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, seed=seed, budget=1, device_name="NVIDIA H200")
    begun = starts.starts(starts.early_runs(tmp_path))
    table = tables.runs.starts(begun).set_index(["recipe", "seed"])
    assert list(table.index) == [("bf16", "1"), ("bf16", "2"), ("tensorwise", "2"), ("fused", "1"), ("fused", "2")]
    losses = table["loss (nats/token)"].astype(float)
    assert losses["bf16", "1"] != losses["bf16", "2"]
    for recipe, seed in (("tensorwise", "2"), ("fused", "1"), ("fused", "2")):
        gap = float(table["− BF16"][recipe, seed].replace("−", "-"))
        assert losses[recipe, seed] - losses["bf16", seed] == pytest.approx(gap, abs=1.5e-4)
    _, fused = starts.by_setting(begun)
    low, high = sorted(start.gap for start in fused)
    which = " and ".join(str(start.ours.record.seed) for start in sorted(fused, key=lambda start: start.gap))
    said = f"{signed(low)} and {signed(high)} nats (seeds {which}) with `fused` at 0.4M"
    assert starts.gaps_text(fused) == said


def test_a_change_of_a_recipe_is_compared_with_its_defaults_on_the_same_seed(tmp_path: Path) -> None:
    for recipe, seed in (("bf16", 1), ("bf16", 2), ("fused", 1), ("fused", 2)):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, seed=seed, budget=1, device_name="NVIDIA H200")
    for seed in (2, 3):
        write_early_change(tmp_path, SIZES[0], "e5m2", {"gradient_format": "e5m2"}, seed=seed)
    begun = starts.starts(starts.early_runs(tmp_path))
    (change,) = starts.changes(begun)
    ends = {
        path.parent.name: json.loads(path.read_text())["final"]["validation_loss"]
        for path in tmp_path.glob("early-*/*/record.json")
    }
    assert change.gap == pytest.approx(ends["0.4M-fused-s2-e5m2"] - ends["0.4M-fused-s2"])
    assert change.gap < 0
    table = tables.runs.starts(begun)
    assert list(table["changed"]) == ["–"] * 4 + ["gradient_format: e5m2"]
    assert starts.gaps_text([change.changed]).endswith("(one seed) with `fused` (`gradient_format: e5m2`) at 0.4M")
    lines = figures.loss.starts(begun).axes[1].get_lines()
    assert [line.get_linestyle() for line in lines if len(line.get_xdata()) > 2] == ["-", "-", "--"]


def test_a_run_of_another_design_is_no_start_beside_these(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, budget=1, device_name="NVIDIA H200")
    path = write_early_change(tmp_path, SIZES[0], "e5m2", {"gradient_format": "e5m2"}) / "record.json"
    record = json.loads(path.read_text())
    record["config"]["optimizer"]["peak_learning_rate"] /= 2
    path.write_text(json.dumps(record))
    assert [start.ours.named for start in starts.starts(starts.early_runs(tmp_path))] == ["`fused`"]


def test_the_share_of_gradients_flushed_is_the_mean_over_linears_at_each_measurement(tmp_path: Path) -> None:
    run = records.read(write_run(tmp_path, "early-h200", SIZES[0], "fused", budget=1, device_name="NVIDIA H200"))
    folder = tmp_path / "early-h200" / run.run
    table = records.read_table(folder, "health")
    first = table["step"].min()
    gradients = table["tensor"] == "grad_output"
    table.loc[gradients, "underflow_fraction"] = 0.25
    layers = table.loc[gradients & (table["step"] == first), "layer"]
    table.loc[gradients & (table["step"] == first) & (table["layer"] == layers.iloc[0]), "underflow_fraction"] = 1.0
    table.loc[~gradients, "underflow_fraction"] = 0.9
    records.write_table(folder, "health", table)
    (early,) = starts.early_runs(tmp_path).runs
    flushed = diagnosis.flushed_gradients(early)
    assert flushed.iloc[0] == pytest.approx(0.25 + 0.75 / len(layers))
    assert flushed.iloc[1:].to_numpy() == pytest.approx(0.25)
    assert flushed.index[0] == first * early.record.global_batch_tokens


def test_a_start_that_diverged_is_named_though_nothing_is_left_to_compare(tmp_path: Path) -> None:
    write_early_records(tmp_path)
    lost = []
    for path in sorted(tmp_path.glob("early-*/*-fused-*/record.json"), reverse=True):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"status": "diverged", "reason": "loss is NaN", "final": None}))
        lost.append(record["run"])
    assert starts.starts(starts.early_runs(tmp_path)) == []
    assert f"Diverged and in no gap: `{lost[0]}` and `{lost[1]}`." in costs(Evidence.read(tmp_path))


def test_a_jump_in_the_first_steps_does_not_flatten_what_follows(tmp_path: Path) -> None:
    write_start(tmp_path, "bf16", 1)
    folder = write_start(tmp_path, "fused", 1.1)
    for recipe_folder in (folder, folder.with_name(folder.name.replace("fused", "bf16"))):
        table = records.read_table(recipe_folder, "metrics")
        table.loc[table["step"] > STABLE_END, "loss"] = 5.0
        table.loc[table["step"] <= WARM, "loss"] = 9.0
        table.loc[(table["step"] == 2) & ("fused" in recipe_folder.name), "loss"] = 13.0
        records.write_table(recipe_folder, "metrics", table)
    difference = figures.loss.starts(starts.starts(starts.early_runs(tmp_path))).axes[1]
    apart = 1.3 * math.log(1.1)
    assert apart < difference.get_ylim()[1] < 1.5 * apart


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
    assert "first minutes" not in costs(Evidence.read(tmp_path))
    write_start(tmp_path, "bf16", 1)
    write_start(tmp_path, "fused", 1.25)
    said = costs(Evidence.read(tmp_path))
    start = only_start(tmp_path)
    losses = {path.parent.name.split("-")[1]: path for path in tmp_path.glob("early-h200/*/record.json")}
    ends = {recipe: json.loads(path.read_text())["final"]["validation_loss"] for recipe, path in losses.items()}
    assert start.gap == pytest.approx(ends["fused"] - ends["bf16"])
    assert f"{signed(start.gap)} nats/token (one seed) with `fused` at 0.4M, 1.25 times." in said


@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_gradients_that_lower_the_loss_of_a_start_are_recommended_and_others_are_not(
    tmp_path: Path, gain: float
) -> None:
    for recipe in ("bf16", "fused"):
        folder = write_run(tmp_path, "early-h200", SIZES[0], recipe, budget=1, device_name="NVIDIA H200")
    default = records.read(folder).final.validation_loss
    path = write_early_change(tmp_path, SIZES[0], "e5m2", {"gradient_format": "e5m2"}) / "record.json"
    record = json.loads(path.read_text())
    record["final"]["validation_loss"] = default - gain
    path.write_text(json.dumps(record))
    evidence = Evidence.read(tmp_path)
    ends = f"`fused` (`gradient_format: e5m2`) ends {signed(-gain)} nats/token from `fused` by its defaults"
    change = f"On seed 1 of 0.4M {ends}"
    assert f"{change}." in costs(evidence)
    told = [said for said in conclusions(evidence) if said.startswith("**Format of gradients.**")]
    assert bool(told) == (gain > 0)
    for said in told:
        assert change in said
        assert "@fig-start-0-4m" in said
        flushed = [
            diagnosis.flushed_gradients(run).max()
            for run in sorted(
                starts.early_runs(tmp_path).where(recipe="fused"), key=lambda run: run.changes, reverse=True
            )
        ]
        assert [small_percent(share) in said for share in flushed] == [True, True]


def test_a_start_on_a_cpu_is_no_measurement(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, budget=1)
    assert not starts.early_runs(tmp_path)
    assert starts.starts(starts.early_runs(tmp_path)) == []
