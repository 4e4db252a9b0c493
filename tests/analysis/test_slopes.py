"""Slopes of the loss: from branches, from a law within the runs that it was fitted to, and nowhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8lab import frontpage, tables
from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.laws import BESIROGLU
from fp8lab.analysis.runs import plan_runs, training_runs
from fp8lab.analysis.slopes import PUBLISHED_LAW, by_law, known_laws, ladder_law, law_slope, measured_slope, slope_at
from fp8lab.config import MODELS, Recipe, parameter_count
from fp8lab.errors import UserError
from tests.fixtures import (
    LADDER,
    LADDER_LAW,
    SIZES,
    move_ladder_losses,
    write_gpu_records,
    write_ladder_records,
    write_run,
    write_speed_records,
)


@given(st.floats(0.02, 0.5), st.floats(0.5, 30.0))
def test_the_slope_of_three_budgets_is_that_of_their_law(exponent: float, scale: float) -> None:
    budgets = [2.5e8, 5e8, 1e9]
    losses = [2 + scale * d**-exponent for d in budgets]
    true = exponent * scale * budgets[-1] ** -exponent
    # Runs of one budget count by their mean, in whatever order they come.
    tokens, noisy = [*budgets, budgets[0]], [losses[0] + 0.01, *losses[1:], losses[0] - 0.01]
    assert measured_slope(tokens, noisy).nats == pytest.approx(true, rel=0.06)
    assert measured_slope(tokens[::-1], noisy[::-1]).nats == pytest.approx(measured_slope(tokens, noisy).nats)


def test_one_budget_has_no_slope() -> None:
    with pytest.raises(UserError, match="different numbers of tokens"):
        measured_slope([1e9, 1e9], [3.0, 3.01])


def test_the_interval_of_a_slope_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    tokens, true = [2.5e8, 5e8, 1e9], 0.2
    exact = np.array([3 - true * math.log(d / 1e9) for d in tokens])
    held = 0
    for _ in range(1000):
        noise = Deviation.pooled([list(rng.normal(0, 0.005, 5))])
        assert noise is not None
        slope = measured_slope(tokens, list(exact + rng.normal(0, 0.005, 3)), noise)
        assert slope.interval is not None
        held += slope.interval[0] <= true <= slope.interval[1]
    assert held / 1000 == pytest.approx(0.95, abs=0.02)
    assert measured_slope(tokens, list(exact)).interval is None


def test_no_law_is_asked_outside_what_it_was_fitted_to() -> None:
    # 7M on 138M tokens: the published law promises a slope of 0.80 where runs fall by 0.47.
    for name in ("7M", "13M", "48M", "125M"):
        n = parameter_count(MODELS[name])
        assert by_law([PUBLISHED_LAW], n, 20 * n) is None
    slope = by_law([PUBLISHED_LAW], parameter_count(MODELS["1.5B"]), 30e9)
    assert slope is not None
    assert (slope.nats, slope.source) == (pytest.approx(law_slope(BESIROGLU, 30e9)), "published law")
    assert by_law([PUBLISHED_LAW], 1e6, 30e9) is None
    assert by_law([PUBLISHED_LAW], 1e9, 1e13) is None


def test_our_ladders_own_law_is_asked_first_and_knows_how_far_off_it_may_be(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    sets = [plan_runs(tmp_path, plan) for plan in ("seeds-h200", "ladder-h200")]
    own, published = known_laws(sets)
    assert published is PUBLISHED_LAW
    n = parameter_count(LADDER[2])
    slope = by_law([own, published], n, 20 * n)
    assert slope is not None
    assert slope.source == "law of ladder-h200"
    assert slope.nats == pytest.approx(law_slope(LADDER_LAW.bf16, 20 * n), rel=0.4)
    assert slope.interval is not None
    assert slope.interval[0] < slope.nats < slope.interval[1]
    assert by_law([own], n, 2000 * n) is None


def test_a_ladders_law_is_asked_between_its_runs_alone(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    own = ladder_law([plan_runs(tmp_path, "ladder-h200")])
    assert own is not None
    smallest, largest = (parameter_count(model) for model in (LADDER[0], LADDER[-1]))
    for n in (smallest, largest):
        assert own.is_between(n, 5 * n)
        assert own.is_between(n, 20 * n)
    # As large as some of its runs and as long as others, but no run is like it.
    assert not own.is_between(smallest, 20 * largest)
    assert not own.is_between(largest, 5 * smallest)
    assert not own.is_between(1.1 * largest, 11 * largest)


def test_a_ladders_law_leaves_out_schedules_too_short_for_it(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    sets = [plan_runs(tmp_path, plan) for plan in ("seeds-h200", "ladder-h200")]
    smallest = parameter_count(LADDER[0])
    true = law_slope(LADDER_LAW.bf16, 20 * smallest)
    untouched = ladder_law(sets)
    assert untouched is not None
    move_ladder_losses(tmp_path, lambda n, budget: 0.8 if n == smallest and budget < 7 else 0.0)
    moved = ladder_law([plan_runs(tmp_path, plan) for plan in ("seeds-h200", "ladder-h200")])
    assert moved is not None
    assert len(moved.runs) == len(untouched.runs) - 1
    assert not moved.is_between(smallest, 5 * smallest)
    assert law_slope(moved.law, 20 * smallest) == pytest.approx(true, rel=0.4)


def test_a_ladder_that_follows_no_law_gives_no_slope(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    sizes = [parameter_count(model) for model in LADDER]
    move_ladder_losses(tmp_path, lambda n, budget: 0.3 * (-1) ** (sizes.index(n) + round(math.log2(budget / 5))))
    sets = [plan_runs(tmp_path, plan) for plan in ("seeds-h200", "ladder-h200")]
    assert ladder_law(sets) is None
    assert known_laws(sets) == [PUBLISHED_LAW]


def test_the_slope_of_a_run_is_that_of_its_decay_branches_or_unknown(tmp_path: Path) -> None:
    write_gpu_records(tmp_path, sizes=SIZES[:1])
    runs = training_runs(tmp_path)
    run = runs.runs[0]
    assert ladder_law([runs]) is None
    assert slope_at([runs], run, known_laws([runs])) is None
    folder = write_run(tmp_path, "pilot-h200", SIZES[0], "bf16", seed=3, device_name="NVIDIA H200")
    record = json.loads((folder / "record.json").read_text())
    record.update(parent={"run": run.record.run, "step": 10}, tokens=record["tokens"] // 2)
    record["final"].update(validation_loss=run.validation_loss + 0.2)
    (folder / "record.json").write_text(json.dumps(record))
    slope = slope_at([training_runs(tmp_path)], run, [])
    assert slope is not None
    assert slope.source == "decay branches"
    assert slope.nats == pytest.approx(0.2 / 0.693, rel=0.05)
    assert slope.interval is not None


@pytest.mark.parametrize("fall", [0.0, 1e-5, -0.1])
def test_a_loss_that_does_not_fall_has_no_slope_and_a_gap_no_price_in_tokens(tmp_path: Path, fall: float) -> None:
    on_gpu: dict[str, Any] = {"device_name": "NVIDIA H200"}
    gaps: dict[Recipe, float] = {"bf16": 0.0, "fused": 0.02}
    for recipe, gap in gaps.items():
        write_run(tmp_path, "ladder-h200", LADDER[0], recipe, budget=20, final_loss=3 + gap, **on_gpu)
        branch_of = f"{LADDER[0].name}-{recipe}-s1"
        write_run(
            tmp_path, "ladder-h200", LADDER[0], recipe, budget=10, branch_of=branch_of, final_loss=3 + fall, **on_gpu
        )
    write_speed_records(tmp_path, trained=LADDER[0])
    (row,) = frontpage.Evidence.read(tmp_path).matched
    assert row.slope is None
    assert tables.speed.matched_table([row])["tokens, × BF16"].tolist() == ["unknown"]


def test_a_slope_that_may_be_flat_is_unknown(tmp_path: Path) -> None:
    for seed, loss in ((1, 3.0), (2, 3.1)):
        for budget, more in ((20, 0.0), (10, 0.1)):
            branch_of = f"{LADDER[0].name}-bf16-s{seed}" if budget == 10 else None
            write_run(
                tmp_path, "ladder-h200", LADDER[0], "bf16",
                seed=seed, budget=budget, branch_of=branch_of, final_loss=loss + more, device_name="NVIDIA H200",
            )  # fmt: skip
    runs = plan_runs(tmp_path, "ladder-h200")
    assert slope_at([runs], runs.runs[0], []) is None
