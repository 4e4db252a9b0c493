"""The scoreboard: every rule gives every verdict that it can, from synthetic records."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fp8lab import claims, records, tables
from fp8lab.analysis import decision
from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.losses import MeasuredGap, measured_gaps, measured_sets
from fp8lab.analysis.occasions import speed_runs
from fp8lab.analysis.runs import RunSet, plan_runs
from fp8lab.analysis.timings import with_verdicts
from fp8lab.claims import Finding
from fp8lab.config import ModelConfig
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


def curves(records_dir: Path) -> dict[str, Finding]:
    """`curves_follow` by the recipe that its scope begins with."""
    found = claims.curves_follow(measured_gaps(measured_sets(records_dir)))
    return {finding.scope.partition(" ")[0].strip("`"): finding for finding in found}


@pytest.mark.parametrize(
    ("gap", "between_seeds", "verdict"),
    [
        (0.002, 0.0002, "confirmed"),
        (0.03, 0.0005, "contradicted"),
        (-0.03, 0.0005, "contradicted"),
        (0.009, 0.01, "untested"),
    ],
)
def test_curves_follow_by_the_interval_of_the_final_gap(
    ladder: Path, gap: float, between_seeds: float, verdict: str
) -> None:
    set_losses(ladder, lambda recipe, _, seed: 3 + (recipe != "bf16") * gap + seed * between_seeds)
    found = curves(ladder)
    assert set(found) == {"tensorwise", "fused"}
    assert {finding.verdict for finding in found.values()} == {verdict}
    assert {finding.reference for finding in found.values()} == {"@fig-gaps"}


def test_a_recipe_is_not_confirmed_by_another_and_a_size_not_by_another(ladder: Path) -> None:
    def loss(recipe: str, parameters: float, seed: int) -> float:
        follows = recipe == "fused" and parameters < 5e5
        return 3 + (0.0 if recipe == "bf16" else 0.001 if follows else 0.012) + seed * 0.0002

    set_losses(ladder, loss)
    for path in ladder.glob("pilot-h200/*-tensorwise-s2/record.json"):
        edit(path, lambda record: record["final"].update(validation_loss=3.03))
    for path in ladder.glob("pilot-h200/*-fused-s2/record.json"):
        if SIZES[0].name not in path.parent.name:
            edit(path, lambda record: record["final"].update(validation_loss=3.03))
    found = curves(ladder)
    assert found["tensorwise"].verdict == "untested"
    assert (found["fused"].verdict, found["fused"].scope) == ("confirmed", "`fused` at 0.4M")


def test_asking_at_many_sizes_confirms_no_more_often(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gaps, confirmed = [], 0
    runs = RunSet("pilot-h200", ())
    for _ in range(300):
        # A gap as large as the margin, at five sizes.
        gaps = [
            MeasuredGap(size, "fused", Gap.between(rng.normal(3.01, 0.004, 8), rng.normal(3, 0.004, 8)), runs)
            for size in ("7M", "13M", "19M", "28M", "48M")
        ]
        (finding,) = claims.curves_follow(gaps)
        confirmed += finding.verdict == "confirmed"
    assert confirmed / 300 < 0.085


def test_runs_that_are_left_after_others_diverged_confirm_nothing(ladder: Path) -> None:
    set_losses(ladder, lambda recipe, _, seed: 3 + (recipe != "bf16") * 0.002 + seed * 0.0002)
    assert curves(ladder)["fused"].scope.startswith(f"`fused` at {SIZES[0].name}, ")
    for size, recipe in ((SIZES[0], "fused"), (SIZES[1], "bf16")):
        folder = write_run(ladder, "pilot-h200", size, recipe, seed=3, device_name="NVIDIA H200")
        diverge(folder)
    found = curves(ladder)
    assert found["fused"].verdict == "confirmed"
    assert found["fused"].scope.startswith(f"`fused` at {SIZES[1].name}, ")
    assert "diverged and are in no mean: 1 of `fused` at 0.4M and 1 of `bf16` at 0.9M." in found["fused"].why
    assert found["tensorwise"].scope.startswith(f"`tensorwise` at {SIZES[0].name}, ")
    for size in FOUR_SIZES[1:]:
        diverge(write_run(ladder, "pilot-h200", size, "fused", seed=3, device_name="NVIDIA H200"))
    assert (curves(ladder)["fused"].verdict, curves(ladder)["fused"].scope) == ("untested", "`fused`")


def test_one_seed_or_a_demo_say_nothing_of_curves(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "pilot-h200", SIZES[0], recipe, device_name="NVIDIA H200")
        write_run(tmp_path, "demo", SIZES[0], recipe)
    one_seed = curves(tmp_path)["fused"]
    assert (one_seed.verdict, "one seed" in one_seed.why) == ("untested", True)
    assert [finding.verdict for finding in claims.curves_follow([])] == ["untested"]


@pytest.fixture
def many_seeds(tmp_path: Path) -> Path:
    """Eight seeds of one size in BF16 and `fused`, to 20 tokens a parameter, without trouble of any kind."""
    for recipe, seed in itertools.product(("bf16", "fused"), range(8)):
        folder = write_run(tmp_path, "pilot-h200", SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
        edit(folder / "record.json", lambda record: record["stability"].update(skipped_steps=0))
        edit(folder / "record.json", lambda record: record.update(tokens=20 * record["parameters"]["total"]))
    return tmp_path


def stability(records_dir: Path) -> Finding:
    found = claims.stable_almost_to_the_end([runs_of(records_dir)])
    return next(finding for finding in found if "fused" in finding.scope)


def trouble(records_dir: Path, run: str, row: int) -> None:
    """Let a run skip the step of one row of its metrics."""
    folder = records_dir / "pilot-h200" / run
    metrics = records.read_table(folder, "metrics")
    metrics.loc[row, "skipped"] = True
    records.write_table(folder, "metrics", metrics)


def test_eight_judged_runs_without_trouble_at_the_claimed_length_confirm_stability(many_seeds: Path) -> None:
    finding = stability(many_seeds)
    assert (finding.verdict, finding.scope) == ("confirmed", "`fused` at 0.4M")
    assert "at most 31% of such runs" in finding.why


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["stability"].update(judged_steps=6),
        lambda record: record["stability"].update(judged_steps=None),
        lambda record: record.update(tokens=5 * record["parameters"]["total"]),
    ],
)
def test_runs_that_were_hardly_judged_or_short_do_not_confirm_stability(many_seeds: Path, change) -> None:
    edit(many_seeds / "pilot-h200" / f"{SIZES[0].name}-fused-s3" / "record.json", change)
    finding = stability(many_seeds)
    assert finding.verdict == "untested"
    assert "7 of 8 were long and judged enough" in finding.why


def test_a_size_is_not_confirmed_by_another_and_a_demo_says_nothing(many_seeds: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(many_seeds, "pilot-h200", SIZES[1], recipe, device_name="NVIDIA H200")
    assert stability(many_seeds).scope == "`fused` at 0.4M"
    assert [finding.verdict for finding in claims.stable_almost_to_the_end([])] == ["untested"]


@pytest.mark.parametrize(("row", "verdict"), [(20, "untested"), (58, "confirmed")])
def test_trouble_of_one_run_leaves_stability_untested_unless_it_comes_at_the_end(
    many_seeds: Path, row: int, verdict: str
) -> None:
    trouble(many_seeds, f"{SIZES[0].name}-fused-s1", row)
    finding = stability(many_seeds)
    assert finding.verdict == verdict
    assert ("; 1 in the last tenth)" in finding.why) == (verdict == "confirmed")


def test_trouble_counts_against_fp8_where_bf16_has_less_on_the_same_data(many_seeds: Path) -> None:
    for seed in range(5):
        trouble(many_seeds, f"{SIZES[0].name}-fused-s{seed}", 20)
    assert stability(many_seeds).verdict == "contradicted"
    for seed in range(4):
        trouble(many_seeds, f"{SIZES[0].name}-bf16-s{seed}", 20)
    assert stability(many_seeds).verdict == "untested"


def test_trouble_of_a_decay_branch_counts(many_seeds: Path) -> None:
    stable = f"{SIZES[0].name}-fused-s1"
    where = {"branch_of": stable, "device_name": "NVIDIA H200"}
    folder = write_run(many_seeds, "pilot-h200", SIZES[0], "fused", seed=1, budget=1, **where)
    edit(folder / "record.json", lambda record: record["stability"].update(skipped_steps=0, judged_steps=0))
    edit(folder / "record.json", lambda record: record["parent"].update(step=50))
    assert stability(many_seeds).verdict == "confirmed"
    trouble(many_seeds, folder.name, 2)
    assert stability(many_seeds).verdict == "untested"


def diverge(folder: Path) -> None:
    """Let a run or branch end before its last tenth, as a divergence ends it."""
    edit(folder / "record.json", lambda record: record.update(status="diverged", final=None))
    edit(folder / "record.json", lambda record: record["stability"].update(first_bad_step=48))


def test_divergences_count_against_fp8_where_bf16_has_fewer(many_seeds: Path) -> None:
    runs = many_seeds / "pilot-h200"
    diverge(runs / f"{SIZES[0].name}-fused-s1")
    assert stability(many_seeds).verdict == "untested"
    for seed in range(2, 6):
        diverge(runs / f"{SIZES[0].name}-fused-s{seed}")
    assert stability(many_seeds).verdict == "contradicted"
    assert "5 diverged" in stability(many_seeds).why
    for seed in range(4):
        diverge(runs / f"{SIZES[0].name}-bf16-s{seed}")
    assert stability(many_seeds).verdict == "untested"


def test_a_branch_that_diverged_counts_against_its_run(many_seeds: Path) -> None:
    for seed in range(8):
        stable = f"{SIZES[0].name}-fused-s{seed}"
        where = {"branch_of": stable, "device_name": "NVIDIA H200"}
        diverge(write_run(many_seeds, "pilot-h200", SIZES[0], "fused", seed=seed, budget=1, **where))
        assert stability(many_seeds).verdict != "confirmed"
    assert stability(many_seeds).verdict == "contradicted"
    assert "8 of 8 at 0.4M (0 of 8 in BF16; 8 diverged" in stability(many_seeds).why


def test_a_single_run_of_bf16_contradicts_nothing(many_seeds: Path) -> None:
    for seed in range(1, 8):
        shutil.rmtree(many_seeds / "pilot-h200" / f"{SIZES[0].name}-bf16-s{seed}")
    diverge(many_seeds / "pilot-h200" / f"{SIZES[0].name}-fused-s1")
    assert stability(many_seeds).verdict == "untested"


def test_a_seed_that_two_plans_train_alike_is_one_run(many_seeds: Path) -> None:
    for path in (many_seeds / "pilot-h200").glob("*-s[4-7]"):
        shutil.rmtree(path)
    shutil.copytree(many_seeds / "pilot-h200", many_seeds / "ladder-h200")
    for path in many_seeds.glob("ladder-h200/*/record.json"):
        edit(path, lambda record: record.update(plan="ladder-h200"))
    plans = [plan_runs(many_seeds, plan) for plan in ("pilot-h200", "ladder-h200")]
    (finding,) = claims.stable_almost_to_the_end(plans)
    assert finding.verdict == "untested"
    assert "0 of 4 at 0.4M (0 of 4 in BF16" in finding.why
    name = f"{SIZES[0].name}-fused-s1"
    for plan in ("pilot-h200", "ladder-h200"):
        diverge(many_seeds / plan / name)
        edit(many_seeds / plan / name / "record.json", lambda record: record["stability"].update(skipped_steps=3))
    plans = [plan_runs(many_seeds, plan) for plan in ("pilot-h200", "ladder-h200")]
    once, twice = (tables.health.spikes(of_plans).set_index("recipe") for of_plans in (plans[:1], plans))
    pd.testing.assert_frame_equal(once, twice)
    assert once["diverged"]["fused"] == 1
    assert {gap.diverged for gap in measured_gaps(plans) if gap.recipe == "fused"} == {1}
    for path in many_seeds.glob("ladder-h200/*/record.json"):
        edit(path, lambda record: record["config"]["optimizer"].update(peak_learning_rate=1e-3))
    (finding,) = claims.stable_almost_to_the_end([plans[0], plan_runs(many_seeds, "ladder-h200")])
    assert "2 of 8 at 0.4M (0 of 8 in BF16; 2 diverged" in finding.why


def test_asking_at_many_sizes_contradicts_stability_no_more_often(many_seeds: Path) -> None:
    for seed in range(4):
        diverge(many_seeds / "pilot-h200" / f"{SIZES[0].name}-fused-s{seed}")
    assert stability(many_seeds).verdict == "contradicted"
    for recipe in ("bf16", "fused"):
        write_run(many_seeds, "pilot-h200", SIZES[1], recipe, device_name="NVIDIA H200")
    assert stability(many_seeds).verdict == "untested"


def forty(records_dir: Path, changes: dict[str, list[float]], occasions: int = 2) -> Finding:
    """The claim of 40%, with the steps of each round of a recipe multiplied."""
    for occasion in range(occasions):
        folder = write_speed_records(records_dir, f"occasion-{occasion}")
        steps = records.read_table(folder, "steps")
        for recipe, factors in changes.items():
            own = (steps["recipe"] == recipe) & (steps["model"] == "1.5B")
            steps.loc[own, "step_ms"] *= steps.loc[own, "round"].map(dict(enumerate(factors)))
        records.write_table(folder, "steps", steps)
    return claims.forty_percent(with_verdicts(speed_runs(records_dir)))


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([1.0, 1.0, 1.0], "contradicted"),
        ([0.8, 0.8, 0.8], "confirmed"),
        ([0.85, 0.8, 0.9], "untested"),
        # Above 1.40 in every round, and falling.
        ([0.76, 0.78, 0.80], "untested"),
    ],
)
def test_forty_percent_is_judged_by_torchaos_fastest_recipe(tmp_path: Path, factors: list[float], verdict: str) -> None:
    finding = forty(tmp_path, {"tensorwise": factors})
    assert finding.verdict == verdict
    assert f"{1.2 / np.exp(np.mean(np.log(factors))):.2f}"[:3] in finding.why
    assert "on H200 (`tensorwise`)" in finding.why


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_one_occasion_settles_no_claim_about_speed(tmp_path: Path, factor: float) -> None:
    finding = forty(tmp_path, {"tensorwise": [factor] * 3}, occasions=1)
    assert finding.verdict == "untested"
    assert "not confirmed yet: one occasion" in finding.why


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_an_occasion_too_short_to_count_confirms_none(tmp_path: Path, factor: float) -> None:
    forty(tmp_path, {"tensorwise": [factor] * 3})
    path = tmp_path / "speed-h200" / "occasion-1" / "steps.parquet"
    steps = pd.read_parquet(path)
    steps[steps["round"] < 2].to_parquet(path)
    table = with_verdicts(speed_runs(tmp_path))
    finding = claims.forty_percent(table)
    assert finding.verdict == "untested"
    assert "; 2 rounds of a shorter occasion left out)" in finding.why
    assert "not confirmed yet: one occasion" in finding.why
    assert {payoff.occasions for payoff in decision.payoffs(table)} == {1}
    assert set(tables.speed.speed_table(speed_runs(tmp_path))["rounds"]) == {"5 (2 left out)"}


def test_a_ratio_that_drifts_is_told_with_its_first_and_last_round(tmp_path: Path) -> None:
    finding = forty(tmp_path, {"fused": [0.95, 1.0, 1.01]})
    assert "above it so far but not confirmed (its rounds fell from 1.52 to 1.43)" in finding.aside or (
        "its rounds fell from 1.53 to 1.44" in finding.aside
    )
    steady = forty(tmp_path / "steady", {})
    assert "on H200, which reaches it" in steady.aside


def test_the_fast_variant_stands_beside_what_torchao_ships(tmp_path: Path) -> None:
    for occasion in ("a", "b"):
        folder = write_speed_records(tmp_path, occasion)
        steps = records.read_table(folder, "steps")
        fast = steps[steps["recipe"] == "tensorwise"].assign(recipe="tensorwise_fast")
        fast["step_ms"] *= 1.2 / 1.25
        records.write_table(folder, "steps", pd.concat([steps, fast]))
    finding = claims.forty_percent(with_verdicts(speed_runs(tmp_path)))
    assert "(`tensorwise`; 1.25 with fast accumulation in all GEMMs)" in finding.why


def test_forty_percent_is_untested_where_the_size_was_not_timed(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    table = with_verdicts(speed_runs(tmp_path))
    assert claims.forty_percent(table[table["model"] != "1.5B"]).verdict == "untested"
    assert claims.forty_percent(table[~table["recipe"].isin(claims.STOCK_RECIPES)]).verdict == "untested"
    assert claims.forty_percent(pd.DataFrame()).verdict == "untested"


@pytest.mark.parametrize(
    ("irreducible", "noise", "verdict"),
    [(0.0, 1e-4, "confirmed"), (1.5, 1e-4, "contradicted"), (0.0, 0.02, "untested"), (1.5, 0.02, "untested")],
)
def test_points_are_on_a_line_where_no_loss_is_irreducible_and_the_noise_would_let_it_be_seen(
    ladder: Path, irreducible: float, noise: float, verdict: str
) -> None:
    rng = np.random.default_rng(3)
    set_losses(ladder, lambda _, n, seed: irreducible + (1e14 / n) ** 0.09 + rng.normal(0, noise))
    assert claims.on_a_line(runs_of(ladder)).verdict == verdict


def test_the_noise_of_a_ladder_with_a_seed_a_size_is_that_of_other_runs(ladder: Path) -> None:
    set_losses(ladder, lambda _, n, seed: (1e14 / n) ** 0.09 + (-1) ** seed * 1e-4)
    runs = runs_of(ladder)
    one_seed = RunSet("ladder-h200", tuple(run for run in runs.runs if run.record.seed == 1))
    assert claims.on_a_line(one_seed).verdict == "untested"
    assert claims.on_a_line(one_seed, [runs]).verdict == "confirmed"


def test_a_line_needs_four_sizes_and_the_noise_between_seeds(ladder: Path, tmp_path: Path) -> None:
    runs = runs_of(ladder)
    few = RunSet(runs.plan, tuple(run for run in runs.runs if run.size != SIZES[0].name))
    one_seed = RunSet(runs.plan, tuple(run for run in runs.runs if run.record.seed == 1))
    assert claims.on_a_line(few).verdict == claims.on_a_line(one_seed).verdict == "untested"
    assert "second seed" in claims.on_a_line(one_seed).why
    assert claims.on_a_line(RunSet("demo", ())).verdict == "untested"


def test_tasks_are_counted_once_and_exceptions_named(ladder: Path) -> None:
    for path in ladder.glob("pilot-h200/*/eval.json"):
        scores = {
            "demo_choice": {"acc,none": 0.26, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.01},
            "demo_boolean": {"acc,none": 0.88},
            "demo_physical": {"acc,none": 0.40},
        }
        edit(path, lambda record, own=scores: [record["results"][task].update(own[task]) for task in own])
    finding = claims.barely_above_guessing(runs_of(ladder))
    assert (finding.verdict, finding.scope) == ("confirmed", "on 2 of 3 tasks")
    assert "demo_boolean by 38 points" in finding.why
    assert "demo_choice" not in finding.why


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
