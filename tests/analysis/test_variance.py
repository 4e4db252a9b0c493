"""The variance study from its records: scatter, price and choice of a design."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8lab import tables
from fp8lab.analysis import variance
from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.losses import GAP_PLANS, measured_gaps, measured_sets
from fp8lab.analysis.runs import SEEDS_PLAN, RunSet, plan_runs, seed_deviation
from fp8lab.plan import load_plan
from tests.fixtures import SIZES, VARIANCE_DESIGNS, Measured, write_run, write_variance_records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(tmp_path: Path) -> variance.Study:
    write_variance_records(tmp_path, measured=Measured(seeds=8))
    return variance.study(tmp_path)


def test_every_design_has_a_cell_by_each_kind_of_weights(study: variance.Study) -> None:
    assert {(cell.design, cell.averaged) for cell in study.cells} == {
        (design, averaged) for design in VARIANCE_DESIGNS for averaged in (False, True)
    }
    assert {cell.seeds for cell in study.cells} == {8}
    assert (study.base.design, study.base.averaged) == ("base", False)
    for cell in study.cells:
        assert set(cell.losses("bf16")) == set(cell.losses("fused")) == set(range(11, 19))
        recorded = [run.averaged if cell.averaged else run.record.final for run in cell.runs]
        assert sorted([*cell.losses("bf16").values(), *cell.losses("fused").values()]) == sorted(
            losses.validation_loss for losses in recorded if losses is not None
        )


def test_scatter_is_within_recipes_and_what_they_differ_by_does_not_add_to_it(study: variance.Study) -> None:
    for cell in study.cells:
        variances = [np.var(list(cell.losses(recipe).values()), ddof=1) for recipe in ("bf16", "fused")]
        assert cell.scatter.value == pytest.approx(math.sqrt(np.mean(variances)))
        assert cell.scatter.degrees == 14
        assert cell.gap == Gap.by_seed(cell.losses("fused"), cell.losses("bf16"))


def test_a_design_costs_its_runs_times_their_measured_time(study: variance.Study) -> None:
    for cell in study.cells:
        speeds = [run.record.speed for run in cell.runs]
        seconds = {speed.wall_seconds for speed in speeds if speed is not None}
        # The fixture's runs all take as long.
        (one,) = seconds
        assert cell.pair_minutes == pytest.approx(2 * one / 60)
        expected, low, high = cell.minutes_needed()
        assert expected == pytest.approx(cell.comparison.pairs_needed() * 2 * one / 60)
        assert low <= expected <= high
    assert study.cheapest.minutes_needed()[0] == min(cell.minutes_needed()[0] for cell in study.cells)


def test_runs_that_shared_a_gpu_share_its_minutes(tmp_path: Path) -> None:
    write_variance_records(tmp_path, measured=Measured(seeds=8))
    alone = variance.study(tmp_path).base.pair_minutes
    for path in tmp_path.glob("variance-h200/*-fused-*/record.json"):
        values = json.loads(path.read_text())
        values["provenance"]["concurrent_runs"] = 2
        path.write_text(json.dumps(values))
    assert variance.study(tmp_path).base.pair_minutes == pytest.approx(0.75 * alone)


def test_later_runs_are_planned_in_pairs_where_seeds_correlate_and_the_studys_own_gaps_are_welchs(
    study: variance.Study,
) -> None:
    by_design = {cell.design: cell for cell in study.cells if not cell.averaged}
    assert by_design["long-decay"].comparison.paired
    assert by_design["long-decay"].comparison.deviation == by_design["long-decay"].differences
    assert not by_design["base"].comparison.paired
    assert by_design["base"].comparison.deviation == by_design["base"].scatter
    assert not any(cell.gap.paired for cell in study.cells)


def test_the_study_decides_for_other_runs_of_the_same_design_and_size(tmp_path: Path) -> None:
    write_variance_records(tmp_path, measured=Measured(seeds=8))
    for path in tmp_path.glob("variance-h200/*-base/record.json"):
        # Both recipes' losses rise with the seed: pairs help.
        edit(path, lambda record: record["final"].update(validation_loss=3 + 0.01 * record["seed"]))
        edit(path, lambda record: record["final"]["averaged"].update(validation_loss=3.0))
    for recipe, model, seed in itertools.product(("bf16", "fused"), SIZES[:2], (1, 2, 3)):
        write_run(tmp_path, SEEDS_PLAN, model, recipe, seed=seed)
    study, seeds = variance.study(tmp_path), plan_runs(tmp_path, SEEDS_PLAN)
    decided = variance.with_pairs(seeds, study)
    assert {size: decided.gap(size, "fused").paired for size in seeds.sizes} == {"0.4M": True, "0.9M": False}
    assert not variance.with_pairs(study.runs, study).paired_sizes
    for path in tmp_path.glob("seeds-h200/*/record.json"):
        edit(path, lambda record: record["config"].update(global_batch_tokens=7))
    assert not variance.with_pairs(plan_runs(tmp_path, SEEDS_PLAN), study).paired_sizes


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_tables_have_a_row_a_cell(study: variance.Study) -> None:
    designs, gaps = tables.losses.variance_designs(study), tables.losses.variance_gaps(study)
    assert len(designs) == len(gaps) == len(study.cells)
    assert (designs["against base"] == "–").sum() == 1
    for cell, pairs in zip(study.cells, designs["pairs for ±0.005"], strict=True):
        low, high = cell.comparison.pairs_range()
        assert pairs == f"{cell.comparison.pairs_needed()} ({low}–{high})"


def test_lines_are_of_sizes_with_seeds_and_of_designs(tmp_path: Path, study: variance.Study) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path, SEEDS_PLAN, SIZES[0], "bf16", seed=seed)
    write_run(tmp_path, SEEDS_PLAN, SIZES[1], "bf16")
    lines = variance.lines([plan_runs(tmp_path, SEEDS_PLAN)], study)
    designs = {f"0.4M, {design}" for design in VARIANCE_DESIGNS}
    assert {"0.4M"} | designs <= set(lines) <= {"0.4M"} | designs | {f"{name}, averaged" for name in designs}
    assert lines["0.4M"].seeds == 3
    # Those of the runs drawn, whatever else was trained where.
    assert lines["0.4M"].devices == ("CPU (2 cores)",)
    assert lines["0.4M, base"].devices == ("NVIDIA H200",)
    assert lines["0.4M, base"].seeds == 8


def test_without_records_or_with_one_seed_there_is_no_study(tmp_path: Path) -> None:
    assert not variance.study(tmp_path)
    write_variance_records(tmp_path, measured=Measured(seeds=1))
    assert not variance.study(tmp_path)


def test_the_plan_and_the_study_agree_on_names() -> None:
    plan = load_plan(ROOT / "runs" / "plans" / "variance-h200.yaml")
    assert plan.name == variance.VARIANCE_PLAN
    suffixes = {config.run.split("-", 3)[3] for config in plan.runs}
    assert variance.BASE in suffixes
    cells = {(suffix, recipe) for suffix in suffixes for recipe in ("bf16", "fused")}
    for suffix, recipe in cells:
        seeds = [config.seed for config in plan.runs if config.recipe == recipe and config.run.endswith(f"-{suffix}")]
        assert len(seeds) == 8
    assert all(config.average_half_life and config.compact for config in plan.runs)


def test_no_plan_whose_gaps_the_study_decides_on_has_its_seeds() -> None:
    def trainings(plan: str) -> set[tuple[str, int]]:
        return {(config.model.name, config.seed) for config in load_plan(ROOT / "runs" / "plans" / f"{plan}.yaml").runs}

    for plan in GAP_PLANS:
        assert not trainings(plan) & trainings(variance.VARIANCE_PLAN), plan
    assert not trainings(SEEDS_PLAN) & trainings("ladder-h200")


def test_how_far_the_study_has_come_is_counted_from_plan_and_records(tmp_path: Path) -> None:
    plan = load_plan(ROOT / "runs" / "plans" / "variance-h200.yaml")
    assert variance.progress(plan_runs(tmp_path, plan.name), plan) == "0 of 8 `bf16` and 0 of 8 `fused` runs"
    write_variance_records(tmp_path, measured=Measured(seeds=5))
    for path in tmp_path.glob("variance-h200/*fused*-base"):
        shutil.rmtree(path)
    assert variance.progress(plan_runs(tmp_path, plan.name), plan) == "5 of 8 `bf16` and 0 of 8 `fused` runs"


def test_the_plan_with_more_seeds_is_believed(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        for model in SIZES[:2]:
            write_run(tmp_path, "ladder-h200", model, recipe, device_name="NVIDIA H200")
        for seed in (1, 2, 3):
            write_run(tmp_path, SEEDS_PLAN, SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
    ladder, seeds = plan_runs(tmp_path, "ladder-h200"), plan_runs(tmp_path, SEEDS_PLAN)
    small, large = gaps = measured_gaps([ladder, seeds])
    assert [(measured.size, measured.recipe) for measured in gaps] == [("0.4M", "fused"), ("0.9M", "fused")]
    assert small.gap == seeds.gap("0.4M", "fused")
    assert (large.gap.mean, large.assumed) == (ladder.gap("0.9M", "fused").mean, True)
    table = tables.losses.loss_gaps(gaps)
    assert table["from"].tolist() == ["two groups", "assumed"]
    assert table["so"].tolist()[1] == "cannot tell: one seed"


def test_scatter_of_smaller_models_is_pooled_over_plans(tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    for plan, seeds in (("a", (1, 2)), ("b", (1, 2, 3))):
        for seed in seeds:
            folder = write_run(tmp_path, plan, SIZES[0], "bf16", seed=seed)
            loss = 3 + 0.01 * seed**2 * len(seeds)
            content = json.loads((folder / "record.json").read_text())
            content["final"]["validation_loss"] = loss
            (folder / "record.json").write_text(json.dumps(content))
            losses.setdefault(plan, []).append(loss)
        write_run(tmp_path, plan, SIZES[1], "bf16")
    sets: list[RunSet] = [plan_runs(tmp_path, plan) for plan in ("a", "b")]
    squares = sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in losses.values())
    small, large = (sets[0].where(size=size)[0] for size in ("0.4M", "0.9M"))
    deviation = seed_deviation(sets, large, below=large.parameters)
    assert deviation is not None
    assert (deviation.value, deviation.degrees) == (pytest.approx(math.sqrt(squares / 3)), 3)
    assert seed_deviation([*sets, *sets], large, below=large.parameters) == deviation, "a run counts once"
    assert seed_deviation(sets, large, size="0.9M") is None
    assert seed_deviation(sets, small, below=small.parameters) is None


def test_scatter_is_that_of_runs_tuned_alike(tmp_path: Path) -> None:
    """The ladder's is that of the study's base design, not of a quieter one at half the learning rate."""
    write_run(tmp_path, "ladder-h200", SIZES[1], "bf16", device_name="NVIDIA H200")
    write_variance_records(tmp_path, measured=Measured(seeds=8))
    study = variance.study(tmp_path)
    assert study.cheapest.design != "base"
    sets = measured_sets(tmp_path)
    (large,) = plan_runs(tmp_path, "ladder-h200").runs
    assert seed_deviation(sets, large, below=large.parameters) == study.base.scatter
