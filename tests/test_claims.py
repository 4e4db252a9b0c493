"""The scoreboard: every rule gives every verdict that it can, from synthetic records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fp8lab import claims, records
from fp8lab.claims import Finding
from fp8lab.config import ModelConfig
from fp8lab.losses import measured_gaps, measured_sets
from fp8lab.results import RunSet, plan_runs, speed_runs
from fp8lab.timings import with_verdicts
from tests.fixtures import SIZES, write_gpu_records, write_run, write_speed_records

FOUR_SIZES = (
    *SIZES,
    ModelConfig(name="4.5M", d_model=256, n_layers=6, n_heads=4, d_ff=704, vocab_size=2048, seq_len=256),
)


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """Records of a GPU, without trouble of any kind, to 20 tokens a parameter."""
    write_gpu_records(tmp_path, sizes=FOUR_SIZES)
    for path in tmp_path.glob("pilot-h200/*/record.json"):
        edit(path, lambda record: record["stability"].update(skipped_steps=0))
        edit(path, lambda record: record.update(tokens=20 * record["parameters"]["total"]))
    return tmp_path


def edit(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def runs_of(records_dir: Path) -> RunSet:
    return plan_runs(records_dir, "pilot-h200")


def set_losses(records_dir: Path, loss_of) -> None:
    """Give every run the loss that `loss_of(recipe, parameters, seed)` says."""
    for path in records_dir.glob("pilot-h200/*/record.json"):
        edit(
            path,
            lambda record: record["final"].update(
                validation_loss=loss_of(record["recipe"], record["parameters"]["total"], record["seed"])
            ),
        )


@pytest.mark.parametrize(
    ("gap", "between_seeds", "verdict"),
    [
        (0.002, 0.0005, "confirmed"),
        (0.03, 0.0005, "contradicted"),
        (-0.03, 0.0005, "contradicted"),
        (0.009, 0.01, "untested"),
    ],
)
def test_curves_follow_by_the_interval_of_the_final_gap(
    ladder: Path, gap: float, between_seeds: float, verdict: str
) -> None:
    set_losses(ladder, lambda recipe, _, seed: 3 + (recipe != "bf16") * gap + seed * between_seeds)
    finding = claims.curves_follow(measured_gaps(measured_sets(ladder)))
    assert (finding.verdict, finding.reference) == (verdict, "@fig-gaps")


def test_one_seed_or_a_demo_say_nothing_of_curves(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "pilot-h200", SIZES[0], recipe, device_name="NVIDIA H200")
        write_run(tmp_path, "demo", SIZES[0], recipe)
    one_seed = claims.curves_follow(measured_gaps(measured_sets(tmp_path)))
    assert (one_seed.verdict, "one seed" in one_seed.why) == ("untested", True)
    assert claims.curves_follow([]).verdict == "untested"


def test_without_trouble_at_the_claimed_length_stability_is_confirmed(ladder: Path) -> None:
    finding = claims.stable_almost_to_the_end([runs_of(ladder)])
    assert finding.verdict == "confirmed"
    assert finding.scope == "at 0.4M, 0.9M, 2.2M and 4.5M"
    assert "nor in it" in finding.why


def test_short_runs_do_not_confirm_stability(ladder: Path) -> None:
    for path in ladder.glob("pilot-h200/*/record.json"):
        edit(path, lambda record: record.update(tokens=5 * record["parameters"]["total"]))
    assert claims.stable_almost_to_the_end([runs_of(ladder)]).verdict == "untested"
    assert claims.stable_almost_to_the_end([]).verdict == "untested"


@pytest.mark.parametrize(("row", "verdict"), [(20, "contradicted"), (58, "confirmed")])
def test_a_skipped_step_contradicts_stability_unless_it_comes_at_the_end(ladder: Path, row: int, verdict: str) -> None:
    folder = ladder / "pilot-h200" / f"{SIZES[0].name}-fused-s1"
    metrics = records.read_table(folder, "metrics")
    metrics.loc[row, "skipped"] = True
    records.write_table(folder, "metrics", metrics)
    finding = claims.stable_almost_to_the_end([runs_of(ladder)])
    assert finding.verdict == verdict
    assert ("1 did in it" in finding.why) == (verdict == "confirmed")


def test_a_diverged_run_contradicts_stability_and_bf16s_troubles_do_not(ladder: Path) -> None:
    bf16 = ladder / "pilot-h200" / f"{SIZES[0].name}-bf16-s1" / "record.json"
    edit(bf16, lambda record: record.update(status="diverged"))
    assert claims.stable_almost_to_the_end([runs_of(ladder)]).verdict == "confirmed"
    fused = ladder / "pilot-h200" / f"{SIZES[0].name}-fused-s1" / "record.json"
    edit(fused, lambda record: record.update(status="diverged"))
    assert claims.stable_almost_to_the_end([runs_of(ladder)]).verdict == "contradicted"


def forty(records_dir: Path, factor: float, spread: float = 0.0) -> Finding:
    """The claim of 40%, with torchao's steps multiplied by `factor`, and by 1 ± `spread` in the outer rounds."""
    folder = write_speed_records(records_dir)
    steps = records.read_table(folder, "steps")
    stock = steps["recipe"] == "tensorwise"
    steps.loc[stock, "step_ms"] *= factor * (1 + spread * (steps.loc[stock, "round"] - 1))
    records.write_table(folder, "steps", steps)
    return claims.forty_percent(with_verdicts(speed_runs(records_dir)))


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"), [(1.0, 0.0, "contradicted"), (0.8, 0.0, "confirmed"), (0.85, 0.1, "untested")]
)
def test_forty_percent_is_judged_by_torchaos_fastest_recipe(
    tmp_path: Path, factor: float, spread: float, verdict: str
) -> None:
    finding = forty(tmp_path, factor, spread)
    assert finding.verdict == verdict
    assert f"{1.2 / factor:.2f}"[:3] in finding.why
    assert "NVIDIA H200" in finding.why


def test_forty_percent_is_untested_where_the_size_was_not_timed(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    table = with_verdicts(speed_runs(tmp_path))
    assert claims.forty_percent(table[table["model"] != "1.5B"]).verdict == "untested"
    assert claims.forty_percent(table[~table["recipe"].isin(claims.STOCK_RECIPES)]).verdict == "untested"
    assert claims.forty_percent(pd.DataFrame()).verdict == "untested"


@pytest.mark.parametrize(("irreducible", "verdict"), [(0.0, "confirmed"), (1.5, "contradicted")])
def test_points_are_on_a_line_where_no_loss_is_irreducible(ladder: Path, irreducible: float, verdict: str) -> None:
    noise = {1: 0.001, 2: -0.001}
    set_losses(ladder, lambda _, n, seed: irreducible + (1e14 / n) ** 0.09 + noise[seed])
    assert claims.on_a_line(runs_of(ladder)).verdict == verdict


def test_a_line_needs_four_sizes_and_the_noise_between_seeds(ladder: Path, tmp_path: Path) -> None:
    runs = runs_of(ladder)
    few = RunSet(runs.plan, tuple(run for run in runs.runs if run.size != SIZES[0].name))
    one_seed = RunSet(runs.plan, tuple(run for run in runs.runs if run.record.seed == 1))
    assert claims.on_a_line(few).verdict == claims.on_a_line(one_seed).verdict == "untested"
    assert "second seed" in claims.on_a_line(one_seed).why
    assert claims.on_a_line(RunSet("demo", ())).verdict == "untested"


def test_scatter_about_a_line_is_as_improbable_as_it_says() -> None:
    rng = np.random.default_rng(3)
    sizes = np.array([7e6, 13e6, 19e6, 28e6, 48e6])
    loss = (1e14 / sizes) ** 0.09
    p_values = [claims.line_fit_p(sizes, loss + rng.normal(0, 0.01, 5), 0.01) for _ in range(1000)]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(("lead", "verdict"), [(0.01, "confirmed"), (0.2, "contradicted")])
def test_scores_are_judged_by_their_lead_over_guessing(ladder: Path, lead: float, verdict: str) -> None:
    guesses = {"demo_choice": 0.25, "demo_boolean": 0.5, "demo_physical": 0.5}
    for path in ladder.glob("pilot-h200/*/eval.json"):
        edit(
            path, lambda scores: [scores["results"][task].update({"acc,none": g + lead}) for task, g in guesses.items()]
        )
    finding = claims.barely_above_guessing(runs_of(ladder))
    assert (finding.verdict, finding.reference) == (verdict, "@fig-scores")


def test_scores_of_a_demo_or_none_leave_the_remarks_untested(tmp_path: Path) -> None:
    write_run(tmp_path, "demo", SIZES[0], "bf16")
    demo = plan_runs(tmp_path, "demo")
    assert claims.barely_above_guessing(demo).verdict == "untested"
    assert claims.barely_above_guessing(RunSet("demo", ())).verdict == "untested"
    assert claims.other_models().verdict == "untested"
