"""Tables of the article: numbers from records, rounded and signed as a reader sees them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import records, tables
from fp8lab.analysis import losses, roofline, scaling, timings
from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.laws import HOFFMANN
from fp8lab.analysis.occasions import MAP_PLAN, SpeedRun, speed_runs
from fp8lab.analysis.operation import data_benchmarks, fault_record, trainer_benchmarks
from fp8lab.analysis.runs import RunSet, plan_runs, training_runs
from fp8lab.analysis.slopes import PUBLISHED_LAW
from fp8lab.config import MODELS
from fp8lab.errors import UserError
from fp8lab.plan import load_plan
from fp8lab.units import signed
from tests.fixtures import (
    LADDER_LAW,
    OTHER,
    SIZES,
    provenance,
    write_demo_records,
    write_ladder_records,
    write_map_records,
    write_reliability_records,
    write_run,
    write_speed_records,
)


@pytest.fixture
def runs(tmp_path: Path) -> RunSet:
    write_demo_records(tmp_path)
    return training_runs(tmp_path)


@pytest.fixture
def speeds(tmp_path: Path) -> list[SpeedRun]:
    write_speed_records(tmp_path, "first")
    write_speed_records(tmp_path, "second", measured=OTHER)
    return speed_runs(tmp_path)


def test_the_run_table_has_every_runs_own_losses(runs: RunSet) -> None:
    table = tables.runs.run_table(runs)
    assert table["validation loss (nats/token)"].tolist() == [f"{run.validation_loss:.4f}" for run in runs.runs]
    assert table["recipe"].tolist() == [run.recipe for run in runs.runs]


def test_final_losses_hold_branches_beside_their_runs_in_every_convention(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    runs = training_runs(tmp_path)
    points = losses.final_losses(runs)
    assert points["is_branch"].sum() == len(runs.branches)
    assert set(points["run"].value_counts()) == {3}
    for run in (*runs.runs, *runs.branches):
        (row,) = points[(points["parameters"] == run.parameters) & (points["loss"] == run.validation_loss)].to_dict(
            "records"
        )
        assert row["tokens"] == run.record.tokens
        assert row["flops_causal"] == pytest.approx(run.record.flops.total)
        assert row["flops_6n"] == 6 * row["parameters"] * row["tokens"]
    table = tables.losses.budget_table(points)
    assert table["model"].tolist() == [size for size in runs.sizes for _ in runs.recipes]
    assert list(table.columns[3:]) == ["5 tokens/N", "10 tokens/N", "20 tokens/N"]
    assert table["20 tokens/N"].tolist() == [f"{run.validation_loss:.4f}" for run in runs.runs]


def test_gaps_by_budget_are_means_over_sizes(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    points = losses.final_losses(training_runs(tmp_path))
    scatter = Deviation(0.005, degrees=10)
    gaps = losses.gaps_by_budget(points, LADDER_LAW, points, scatter)
    table = tables.scaling.gap_by_budget(gaps).set_index("recipe")
    by_size = points.pivot_table(index=["budget", "size"], columns="recipe", values="loss")
    for recipe in ("tensorwise", "fused"):
        for budget in (5, 10, 20):
            gap = (by_size[recipe] - by_size["bf16"]).loc[float(budget)].mean()
            assert table.loc[recipe, f"{budget} tokens/N"] == f"{signed(gap)} ± {scatter.reach(5):.4f}"


def test_a_budget_that_the_law_was_not_fitted_to_has_no_gap_by_it(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    points = losses.final_losses(training_runs(tmp_path))
    fitted = points[points["tokens"] > points["tokens"].min()]
    gaps, of_all = (losses.gaps_by_budget(points, LADDER_LAW, part, None) for part in (fitted, points))
    shortest = gaps["budget"] == points["budget"].min()
    assert gaps.loc[shortest, "by_law"].isna().all()
    pd.testing.assert_frame_equal(gaps[~shortest], of_all[~shortest])
    assert gaps["mean"].tolist() == of_all["mean"].tolist()
    assert tables.scaling.gap_by_budget(gaps)["5, by the law"].tolist() == ["–", "–"]


def test_more_seeds_of_a_size_narrow_the_gap_of_a_budget_and_do_not_outweigh_other_sizes(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    points = losses.final_losses(training_runs(tmp_path))
    scatter = Deviation(0.005, degrees=10)
    smallest = points[points["size"] == points["size"].iloc[0]]
    more = pd.concat([points, smallest], ignore_index=True)
    once, twice = (losses.gaps_by_budget(these, LADDER_LAW, these, scatter) for these in (points, more))
    assert twice["mean"].to_numpy() == pytest.approx(once["mean"].to_numpy())
    # Four sizes with one seed a side, whose differences have twice the variance of a run, and one with two.
    assert (twice["reach"] / once["reach"]).to_numpy() == pytest.approx(((4 * 2 + 1) / (5 * 2)) ** 0.5)
    assert losses.gaps_by_budget(points, LADDER_LAW, points, None)["reach"].isna().all()


def test_an_extrapolation_starts_at_the_largest_measured_size(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    points = losses.final_losses(training_runs(tmp_path))
    beyond = scaling.extrapolated(points, LADDER_LAW, [LADDER_LAW], 20)
    assert beyond["size"].tolist() == ["48M", "125M", "250M", "350M", "1.5B"]
    assert beyond["factor"].iloc[0] == 1
    assert beyond["loss"].to_numpy() == pytest.approx(LADDER_LAW(beyond["parameters"], 20 * beyond["parameters"]))
    assert (beyond["drop"].diff().dropna() > 0).all()
    assert beyond.loc[4, "Hoffmann et al."] == pytest.approx(
        float(HOFFMANN(48_527_680, 20 * 48_527_680) - HOFFMANN(1_541_792_768, 20 * 1_541_792_768))
    )
    assert tables.scaling.extrapolation_table(beyond)["model"].tolist() == ["125M", "250M", "350M", "1.5B"]


def test_gaps_are_signed_with_a_true_minus(runs: RunSet) -> None:
    table = tables.losses.loss_gaps(losses.measured_gaps([runs]))
    for (_, row), gap in zip(table.iterrows(), runs.gaps().values(), strict=True):
        shown = row["FP8 − BF16 (nats/token)"]
        assert shown[0] == ("+" if gap.mean >= 0 else "−")
        assert float(shown.replace("−", "-")) == pytest.approx(gap.mean, abs=5e-5)
        assert row["95% interval"] == "–"


def test_gaps_over_seeds_carry_an_interval(tmp_path: Path) -> None:
    write_demo_records(tmp_path, seeds=(1, 2, 3))
    table = tables.losses.loss_gaps(losses.measured_gaps([training_runs(tmp_path)]))
    assert set(table["seeds"]) == {3}
    assert all(" to " in interval for interval in table["95% interval"])


def test_the_share_in_fp8_is_that_of_the_recipe_at_its_size(runs: RunSet) -> None:
    table = tables.runs.parameter_conventions(runs).set_index("model")
    record = runs.where(size=runs.sizes[0])[0].record
    blocks = 1 - record.model.vocab_size * record.model.d_model / record.parameters.matmul
    assert table.loc[runs.sizes[0], "in FP8, tensorwise"] == f"{blocks:.0%}"
    assert table.loc[runs.sizes[0], "in FP8, rowwise_with_gw_hp"] == f"{blocks * 2 / 3:.0%}"
    assert table.loc[runs.sizes[-1], "in FP8, rowwise_with_gw_hp"] == "–", "not trained at this size"


def test_the_bound_halves_what_fp8_reaches() -> None:
    row = tables.speed.bound(["1.5B"]).iloc[0]
    shares = {name: float(row[name].rstrip("%")) / 100 for name in ("linear layers in blocks", "head", "attention")}
    assert sum(shares.values()) == pytest.approx(1, abs=0.015)
    assert float(row["bound, head in BF16"].rstrip("×")) == pytest.approx(
        1 / (1 - shares["linear layers in blocks"] / 2), abs=0.01
    )
    assert float(row["bound, head in FP8"].rstrip("×")) == pytest.approx(
        1 / (1 - (1 - shares["attention"]) / 2), abs=0.01
    )


def test_the_conversion_table_counts_every_layer_once(runs: RunSet) -> None:
    run = next(run for run in runs.runs if run.recipe == "tensorwise")
    table = tables.runs.conversion(run)
    assert table["layers of this kind"].sum() == len(run.record.conversion)
    assert table.set_index("layer")["precision"]["head"] == "bf16"


def test_a_speed_ratio_is_formed_within_its_round(tmp_path: Path) -> None:
    """A GPU that slows down for everyone from round to round changes no ratio."""
    folder = write_speed_records(tmp_path)
    before = timings.speed_ratios(speed_runs(tmp_path)).set_index(["setting", "recipe", "head"])
    steps = records.read_table(folder, "steps")
    steps["step_ms"] *= 1 + 0.3 * steps["round"]
    records.write_table(folder, "steps", steps)
    after = timings.speed_ratios(speed_runs(tmp_path)).set_index(["setting", "recipe", "head"])
    pd.testing.assert_frame_equal(after[["ratio", "low", "high"]], before[["ratio", "low", "high"]])
    assert (after["tokens_per_second"] < before["tokens_per_second"]).all()


def with_contestant(folder: Path, recipe: str, like: str, factor: float) -> SpeedRun:
    """An occasion with one more contestant, whose steps take `factor` times those of another."""
    steps = records.read_table(folder, "steps")
    own = steps[(steps["recipe"] == like) & (steps["head"] == "bf16")].assign(recipe=recipe)
    records.write_table(folder, "steps", pd.concat([steps, own.assign(step_ms=own["step_ms"] * factor)]))
    return next(speed for speed in speed_runs(folder.parents[1]) if speed.folder == folder)


def test_ratios_are_to_the_fastest_bf16_which_is_no_fp8_recipe(tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    before = timings.speed_ratios(speed_runs(tmp_path)).set_index(["model", "recipe", "head"])
    speed = with_contestant(folder, "te_bf16", "bf16", 0.5)
    table = timings.speed_ratios([speed])
    after = table.set_index(["model", "recipe", "head"])
    assert set(table["baseline"]) == {"te_bf16"}
    for key in before.index:
        assert after.loc[key, "ratio"] == pytest.approx(before.loc[key, "ratio"] / 2)
    assert "te_bf16" not in set(timings.fp8_only(table)["recipe"])
    ceiling = tables.speed.gemm_ceiling([speed])
    assert set(ceiling["recipe"]) == {"fused"}
    # A slower one changes nothing.
    slower = with_contestant(write_speed_records(tmp_path, "b"), "te_bf16", "bf16", 1.1)
    assert set(timings.speed_ratios([slower])["baseline"]) == {"bf16"}


def test_two_rounds_decide_nothing_however_far_from_bf16(tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    steps = records.read_table(folder, "steps")
    records.write_table(folder, "steps", steps[(steps["model"] != "125M") | (steps["round"] < 2)])
    table = timings.with_verdicts(speed_runs(tmp_path)).set_index(["model", "recipe", "head"])
    assert table.loc[("125M", "fused", "bf16"), "verdict"] == "undecided"
    assert table.loc[("1.5B", "fused", "bf16"), "verdict"] == "faster"
    assert table.loc[("1.5B", "rowwise", "bf16"), "verdict"] == "slower"
    read = tables.speed.switch_table(table.reset_index(), []).set_index(["model", "recipe"])
    assert read.loc[("1.5B", "fused"), "batch × context"] == "16 × 2,048"
    assert read.loc[("125M", "fused"), "tokens/s, × BF16"].endswith("(2 rounds)")
    assert read.loc[("1.5B", "fused"), "pays for (nats)"] == "unknown"
    assert float(
        tables.speed.switch_table(table.reset_index(), [PUBLISHED_LAW])
        .set_index(["model", "recipe"])
        .loc[("1.5B", "fused"), "pays for (nats)"]
    ) == pytest.approx(0.04, abs=0.01)


def test_speed_ratios_are_of_bf16s_time_over_the_recipes(speeds: list[SpeedRun]) -> None:
    ratios = timings.speed_ratios(speeds[:1]).set_index(["model", "recipe", "head"])
    assert ratios["ratio"]["1.5B", "bf16", "bf16"] == 1
    assert ratios["ratio"]["1.5B", "fused", "bf16"] == pytest.approx(1.45, abs=0.02)
    assert ratios["ratio"]["1.5B", "rowwise", "bf16"] == pytest.approx(0.75, abs=0.02)
    assert ((ratios["low"] <= ratios["ratio"]) & (ratios["ratio"] <= ratios["high"])).all()
    assert (ratios["rounds"] == 3).all()


def test_processes_that_ran_at_the_same_time_are_one_occasion(tmp_path: Path) -> None:
    folders = [write_speed_records(tmp_path, occasion) for occasion in "abc"]
    begin = json.loads((folders[0] / "record.json").read_text())["provenance"]["started_utc"]
    record = json.loads((folders[1] / "record.json").read_text())
    record["provenance"]["started_utc"] = begin  # b began with a, and ended after it
    (folders[1] / "record.json").write_text(json.dumps(record))
    (row,) = (
        timings.speed_ratios(speed_runs(tmp_path))
        .query("model == '1.5B' and recipe == 'fused' and head == 'bf16'")
        .to_dict("records")
    )
    assert (row["occasions"], row["rounds"]) == (2, 9)


def test_what_failed_is_told_once_with_its_settings_unless_it_was_timed_elsewhere(tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    cases = record["results"]["cases"]
    (case,) = cases.values()
    error = {"error": "UserError: not installed: libx", "traceback": ""}
    cases["350M-T1024-B32"] = {"contestants": {"bf16": {}}, "errors": {"te_delayed": error}}
    case["errors"] = {"te_delayed": error, "rowwise": error, "te_bf16": error}
    (folder / "record.json").write_text(json.dumps(record))
    later = write_speed_records(tmp_path, "b")
    record = json.loads((later / "record.json").read_text())
    (case,) = record["results"]["cases"].values()
    case["contestants"]["rowwise"], case["errors"] = case["contestants"]["bf16"], {}
    (later / "record.json").write_text(json.dumps(record))
    assert timings.not_timed(speed_runs(tmp_path)) == [
        "te_delayed at 1.5B-T2048-B16 and 350M-T1024-B32 (UserError: not installed: libx)",
        "te_bf16 at 1.5B-T2048-B16 (UserError: not installed: libx)",
    ]


def test_occasions_are_pooled_round_by_round(speeds: list[SpeedRun]) -> None:
    ratios = timings.speed_ratios(speeds).set_index(["model", "recipe", "head"])
    assert (ratios["rounds"] == 6).all()
    assert (ratios["occasions"] == 2).all()
    first, second = (timings.speed_ratios([speed]).set_index(["model", "recipe", "head"]) for speed in speeds)
    assert ratios["low"]["1.5B", "fused", "bf16"] == first["low"]["1.5B", "fused", "bf16"]
    assert ratios["high"]["1.5B", "fused", "bf16"] == second["high"]["1.5B", "fused", "bf16"]


def test_two_devices_are_never_pooled(speeds: list[SpeedRun]) -> None:
    first, second = speeds
    provenance = second.record.provenance.model_copy(update={"device_name": "NVIDIA H100 80GB HBM3"})
    other = replace(second, record=second.record.model_copy(update={"provenance": provenance}))
    ratios = timings.speed_ratios([first, other])
    for speed, device in ((first, "NVIDIA H200"), (other, "NVIDIA H100 80GB HBM3")):
        alone = timings.speed_ratios([speed])
        own = ratios[ratios["device"] == device].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.drop(columns="setting"), alone.drop(columns="setting"))
    by_setting = ratios.groupby("setting")["device"].nunique()
    assert (by_setting == 1).all(), "a figure that goes by setting keeps devices apart"
    assert "1.5B, T 2048, 16 sequences, H100" in by_setting.index
    drift = timings.speed_drift([first, other])
    assert set(drift["setting"]) == set(ratios["setting"])


def test_of_our_recipes_only_occasions_with_the_latest_kernels_count(speeds: list[SpeedRun]) -> None:
    def of(speed: SpeedRun, kernels: str | None, started: str) -> SpeedRun:
        provenance = speed.record.provenance
        versions = {"torch": "2.13.0"} | ({records.KERNELS: kernels} if kernels else {})
        when = {"started_utc": started, "ended_utc": f"{started}T01:00:00+00:00"}
        changed = provenance.model_copy(update={"versions": versions} | when)
        return replace(speed, record=speed.record.model_copy(update={"provenance": changed}))

    def occasions(*runs: SpeedRun) -> dict[str, int]:
        table = timings.speed_ratios(runs)
        return table[(table["model"] == "1.5B") & (table["head"] == "bf16")].set_index("recipe")["occasions"].to_dict()

    one, other = speeds
    late, early = of(one, "new", "2026-01-03"), of(other, "old", "2026-01-02")
    assert occasions(late, early) == occasions(early, late)
    assert (occasions(late, early)["fused"], occasions(late, early)["tensorwise"]) == (1, 2)
    ours = timings.speed_ratios([late, early]).set_index(["model", "recipe", "head"]).loc[("1.5B", "fused", "bf16")]
    assert (
        ours["low"]
        == timings.speed_ratios([late]).set_index(["model", "recipe", "head"])["low"]["1.5B", "fused", "bf16"]
    )
    assert occasions(late, of(other, "new", "2026-01-02"))["fused"] == 2
    short = replace(late, record=late.record)
    short.__dict__["steps"] = late.steps[late.steps["round"] < 1]
    assert occasions(short, early)["fused"] == 1, "too short to make another out of date"
    row = timings.with_verdicts([late, early]).set_index(["model", "recipe", "head"]).loc[("1.5B", "fused", "bf16")]
    assert row["runs"] == f"{late.record.plan}/{late.record.run}"
    # Records that do not say are told apart by their commits, which differ here.
    assert occasions(of(one, None, "2026-01-03"), of(other, None, "2026-01-02"))["fused"] == 1


def with_turns(speed: SpeedRun, seconds: float, rounds: int = 3, left_out: str = "") -> SpeedRun:
    """The occasion with its shortest turn at 1.5B so long, so many rounds, and one recipe less."""
    steps = speed.steps[(speed.steps["round"] < rounds) & (speed.steps["recipe"] != left_out)]
    at_largest = steps[steps["model"] == "1.5B"]
    turns = at_largest.groupby(["recipe", "head", "round"])["step_ms"].sum()
    shortest = turns.groupby(["recipe", "head"]).median().min()
    changed = replace(speed, record=speed.record)
    changed.__dict__["steps"] = steps.assign(step_ms=1e3 * seconds / shortest * steps["step_ms"])
    return changed


def test_short_turns_do_not_count_where_two_occasions_had_long_ones(tmp_path: Path) -> None:
    for occasion in "abc":
        write_speed_records(tmp_path, occasion)
    a, b, c = speed_runs(tmp_path)

    def rounds(*occasions: SpeedRun, recipe: str = "fused") -> int:
        table = timings.speed_ratios(occasions)
        return int(table.query(f"model == '1.5B' and recipe == '{recipe}' and head == 'bf16'")["rounds"].item())

    short, one, other = with_turns(a, 0.99), with_turns(b, 1.01), with_turns(c, 1.01)
    assert a.steps.groupby(["model", "recipe", "head", "round"]).size().min() > 1
    assert rounds(short, one, other) == 6
    assert rounds(with_turns(a, 1.01), one, other) == 9
    assert rounds(short, one) == 6, "one occasion of long turns confirms nothing by itself"
    assert rounds(short, one, with_turns(c, 1.01, rounds=2)) == 8, "nor does one too short to count"
    provenance = b.record.provenance.model_copy(update={"ended_utc": c.record.provenance.ended_utc})
    longer = replace(one, record=b.record.model_copy(update={"provenance": provenance}))
    longer.__dict__["steps"] = one.steps
    assert rounds(short, longer, other) == 9, "two processes at the same time are one occasion"
    others = with_turns(b, 1.01, left_out="tensorwise"), with_turns(c, 1.01, left_out="tensorwise")
    assert rounds(short, *others, recipe="tensorwise") == 3, "of what had no long turns the short ones count"


def test_the_interval_of_two_occasions_covers_both(speeds: list[SpeedRun]) -> None:
    both = timings.speed_ratios(speeds).set_index(["model", "recipe", "head"])
    first, second = (timings.speed_ratios([speed]).set_index(["model", "recipe", "head"]) for speed in speeds)
    row = ("1.5B", "fused", "bf16")
    assert both["interval_low"][row] == min(first["interval_low"][row], second["interval_low"][row])
    assert both["interval_high"][row] == max(first["interval_high"][row], second["interval_high"][row])
    assert both["interval_low"][row] < both["ratio"][row] < both["interval_high"][row]


def test_losses_of_the_first_steps_are_compared_step_by_step(speeds: list[SpeedRun]) -> None:
    (speed, *_) = speeds
    case = speed.record.results["cases"]["1.5B-T2048-B16"]
    losses = {"bf16": [11.0, 10.0, 9.0, 8.0], "te_delayed": [11.0, 11.0, 9.5, 8.1], "nanochat": []}
    contestants = {name: {"warmup_losses": values} for name, values in losses.items()}
    results = speed.record.results | {"cases": {"1.5B-T2048-B16": case | {"contestants": contestants}}}
    changed = replace(speed, record=speed.record.model_copy(update={"results": results}))
    (row,) = timings.warmup_losses([changed]).to_dict("records")
    assert row["contestant"] == "te_delayed"
    assert row["mean_difference"] == pytest.approx(0.3), "over the second half"
    assert row["largest_difference"] == pytest.approx(1.0)
    assert (row["last"], row["bf16_last"]) == (8.1, 8.0)


def test_a_prediction_stands_beside_its_measurement(speeds: list[SpeedRun]) -> None:
    table = timings.roofline_against_measurement(speeds[:1]).set_index(["model", "recipe"])
    ratios = timings.speed_ratios(speeds[:1]).set_index(["model", "recipe", "head"])
    assert set(table.index.get_level_values("recipe")) == {"bf16", "tensorwise", "fused"}, "what it can predict"
    assert table["measured_ratio"]["1.5B", "fused"] == ratios["ratio"]["1.5B", "fused", "bf16"]
    model = MODELS["1.5B"].model_copy(update={"seq_len": 2048})
    assert table["predicted_ms"]["1.5B", "fused"] == roofline.step_ms(model, 32768, "fused", roofline.H200)


def test_the_map_tells_how_busy_the_gpu_was_in_the_slacker_of_both_steps(tmp_path: Path) -> None:
    write_map_records(tmp_path)
    (folder,) = tmp_path.glob("speed-map/h200")
    record = json.loads((folder / "record.json").read_text())
    contestants = record["results"]["cases"]["w1024-T1024-B64"]["contestants"]
    contestants["bf16"]["profile"]["ms_by_category"] = {"gemm": 10.0, "other": 20.0}
    (folder / "record.json").write_text(json.dumps(record))
    table = timings.break_even(speed_runs(tmp_path, MAP_PLAN)).set_index(["device", "recipe", "width", "tokens"])
    steps = records.read_table(folder, "steps")
    rows = steps[(steps["model"] == "w1024") & (steps["micro_batch"] == 64) & (steps["recipe"] == "bf16")]
    settled = rows[rows["round"] >= 2]["step_ms"].median()
    assert table.loc[("H200", "fused", 1024, 65536), "busy"] == pytest.approx(30 / settled, rel=0.002)
    assert table.loc[("H200", "fused", 512, 65536), "busy"] == pytest.approx(0.95, abs=0.01)
    assert table.loc[("H200", "fused", 512, 8192), "busy"] == pytest.approx(0.4, abs=0.01)


def test_the_map_holds_a_measurement_only_where_there_is_one(tmp_path: Path) -> None:
    planned = timings.break_even([])
    assert planned["busy"].isna().all()
    assert planned["measured"].isna().all()
    folder = write_speed_records(tmp_path)
    steps = records.read_table(folder, "steps")
    steps = steps[(steps["model"] == "125M") & (steps["head"] == "bf16")].assign(model="w512", micro_batch=8)
    steps["recipe"] = steps["recipe"].replace("tensorwise", "tensorwise_fast")
    records.write_table(folder, "steps", steps)
    table = timings.break_even(speed_runs(tmp_path))
    known = table.dropna(subset=["measured"])
    assert known[["device", "tokens", "width"]].drop_duplicates().to_numpy().tolist() == [["H200", 8192, 512]]
    assert set(known["recipe"]) == {"fused", "tensorwise"}
    pd.testing.assert_series_equal(table["predicted"], planned["predicted"])
    assert table["busy"].isna().all(), "nothing was profiled"
    # Another form of the chip has a map of its own.
    record = json.loads((folder / "record.json").read_text())
    record["provenance"]["device_name"] = "NVIDIA H200 NVL"
    (folder / "record.json").write_text(json.dumps(record))
    assert timings.break_even(speed_runs(tmp_path))["measured"].isna().all()


def test_settings_go_from_the_fastest_model_to_the_slowest(speeds: list[SpeedRun]) -> None:
    assert list(dict.fromkeys(timings.speed_ratios(speeds)["model"])) == ["125M", "350M", "1.5B"]


def test_the_ceiling_leaves_out_the_head(speeds: list[SpeedRun]) -> None:
    (row,) = tables.speed.gemm_ceiling(speeds[:1]).to_dict("records")
    # 56 layers with three GEMMs each, of 2 ms in BF16 and 1 ms in FP8; a step of 609 ms.
    assert row["its blocks' GEMMs (ms)"] == "336.0"
    assert row["in FP8 (ms)"] == "168.0"
    assert float(row["× BF16, casts free"]) == pytest.approx(609 / (609 - 168), abs=0.01)
    assert row["recipe"] == "fused"


def test_a_plan_shows_what_it_costs_before_it_runs() -> None:
    table = tables.runs.planned_runs(load_plan(Path("runs/plans/article.yaml")), bf16_mfu=0.4).set_index("run")
    row = table.loc["125M-bf16-s1"]
    assert row["parameters"] == "123,588,864"
    # 12 layers of 4·768² + 3·768·2048 weights and a head of 50,304 × 768, at 2,471,777,280 tokens.
    matmul = 12 * (4 * 768**2 + 3 * 768 * 2048) + 50_304 * 768
    tokens = 2_471_777_280
    assert float(row["FLOPs, 6·N"]) == pytest.approx(6 * 123_588_864 * tokens, rel=5e-3)
    attention = 12 * 12 * 768 * 1024
    assert float(row["FLOPs, matmul + attention"]) == pytest.approx((6 * matmul + attention) * tokens, rel=5e-3)
    assert float(row["FLOPs, causal"]) == pytest.approx((6 * matmul + attention / 2) * tokens, rel=5e-3)
    hours = (6 * matmul + attention / 2) * tokens / (0.4 * 989.4e12) / 3600
    assert float(row["hours, 1 H100"]) == pytest.approx(hours, rel=0.05)
    assert table.loc["1.5B-bf16-s1", "tokens"] == "30,000,000,000"
    assert all(0 < float(memory) <= 80 for memory in table["memory (GB)"])


def test_twice_the_utilisation_is_half_the_hours() -> None:
    plan = load_plan(Path("runs/plans/article.yaml"))
    slow, fast = (tables.runs.planned_runs(plan, bf16_mfu=share).set_index("run") for share in (0.25, 0.5))
    assert float(slow.loc["1.5B-bf16-s1", "hours, 1 H100"]) == pytest.approx(
        2 * float(fast.loc["1.5B-bf16-s1", "hours, 1 H100"]), rel=0.01
    )


def _benchmark(run: str, results: dict[str, object]) -> records.BenchmarkRecord:
    return records.BenchmarkRecord(
        plan="benchmarks", run=run, status="finished", provenance=provenance(), results=results
    )


def test_data_benchmarks_show_the_median_its_range_and_the_goal(tmp_path: Path) -> None:
    speed = {"median": 52_345_678.0, "min": 40e6, "max": 60e6, "rounds": [40e6, 52_345_678.0, 60e6]}
    records.write(_benchmark("data-loader", {"batch_tokens": 131_072, "tokens_per_second": speed}), tmp_path)
    memory = {"document_bytes": 100_000_000, "peak_memory_bytes": 3 << 29}
    records.write(_benchmark("data-memory", memory), tmp_path)
    records.write(_benchmark("checkpoint", {"seconds": 1.0}), tmp_path)
    table = tables.data.data_benchmarks(data_benchmarks(tmp_path))
    assert table[["median", "range", "goal"]].to_numpy().tolist() == [
        ["52.3M", "40M to 60M", "≥ 10M"],
        ["1.50", "–", "< 2"],
    ]


def test_a_benchmark_without_its_figures_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"benchmarks/data-tokenise/record\.json: build_megabytes_per_second: missing"):
        tables.data.data_benchmarks([_benchmark("data-tokenise", {})])


def test_drift_is_of_the_last_round_over_the_first(tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    steps = records.read_table(folder, "steps")
    slowed = (steps["recipe"] == "fused") & (steps["head"] == "fp8") & (steps["model"] == "1.5B")
    steps.loc[slowed & (steps["round"] == steps["round"].max()), ["step_ms", "sm_clock_mhz"]] *= [1.1, 0.5]
    records.write_table(folder, "steps", steps)
    drift = timings.speed_drift(speed_runs(tmp_path)).set_index(["setting", "recipe", "head"])
    assert drift.loc[("1.5B, T 2048, 16 sequences", "fused", "fp8"), "change"] == pytest.approx(0.1, abs=0.02)
    assert drift.loc[("1.5B, T 2048, 16 sequences", "fused", "fp8"), "last_clock_mhz"] == 900
    assert drift["change"].drop(("1.5B, T 2048, 16 sequences", "fused", "fp8")).abs().max() < 0.02


def test_scaling_out_compares_with_as_many_times_one_gpu(tmp_path: Path) -> None:
    # The last was too short for its speed to be known.
    runs = ((1, "ddp", 100.0), (2, "fsdp", 150.0), (2, "ddp", 190.0), (4, "ddp", None))
    for count, sharding, tokens_per_second in runs:
        folder = write_run(tmp_path, "scaling-out-h200", SIZES[0], "bf16", device_name="NVIDIA H100 80GB HBM3")
        run = records.read(folder)
        assert isinstance(run, records.TrainRecord)
        assert run.speed is not None
        run.run = f"{sharding}-{count}"
        run.provenance.device_count = count
        run.config["sharding"] = sharding
        run.speed.tokens_per_second_median = tokens_per_second
        records.write(run, tmp_path)
        shutil.rmtree(folder)
    table = tables.speed.scaling_out(plan_runs(tmp_path, "scaling-out-h200"))
    assert table["GPUs"].tolist() == [1, 2, 2]
    assert dict(zip(table["sharding"], table["efficiency"], strict=True)) == {
        "": "100.0%",
        "ddp": "95.0%",
        "fsdp": "75.0%",
    }


def test_a_fault_is_listed_once_with_every_precision_it_was_seen_in(tmp_path: Path) -> None:
    write_reliability_records(tmp_path)
    record = fault_record(tmp_path)
    assert record is not None
    # In the order of the article's topics, not of the record.
    assert tables.operation.faults(record)["seen in"].tolist() == ["bf16, fused", "–"]
    measured = tables.operation.fault_measurements(record)
    assert measured["test"].tolist() == ["killed", "killed", "a second process is refused"]
    assert measured["measured"][1] == "recipe: fused; newest checkpoints: 250, 500; steps: 1000"


def test_a_report_that_says_too_little_is_refused_by_field(tmp_path: Path) -> None:
    write_reliability_records(tmp_path)
    record = fault_record(tmp_path)
    assert record is not None
    del record.results["faults"][0]["outcome"]
    with pytest.raises(UserError, match=r"reliability/fault-tests/record\.json: faults: outcome: missing"):
        tables.operation.faults(record)
    record.results["faults"][0] |= {"outcome": "", "topic": "flood"}
    with pytest.raises(UserError, match="unknown topic 'flood'; known: kill, signal"):
        tables.operation.faults(record)


def test_costs_of_the_trainer_are_shown_beside_their_goals(tmp_path: Path) -> None:
    write_reliability_records(tmp_path)
    table = tables.operation.trainer_benchmarks(trainer_benchmarks(tmp_path)).set_index("what")
    assert table.loc["all together (% of it)", ["median", "range", "goal"]].tolist() == [
        "+1.18",
        "+0.84 to +1.52",
        "< 2",
    ]
    assert table.loc["health (% of it)", "goal"] == "< 1"
    assert table.loc["checkpoint (GB)", "median"] == "1.49"


def test_what_was_not_measured_on_a_gpu_is_no_cost(tmp_path: Path) -> None:
    write_reliability_records(tmp_path)
    for path in tmp_path.glob("benchmarks/trainer-*/record.json"):
        path.write_text(path.read_text().replace("NVIDIA H200", "CPU, 2 cores"))
    assert trainer_benchmarks(tmp_path) == []
    assert tables.operation.trainer_benchmarks([]).empty


def test_a_resumed_run_stands_beside_its_control(tmp_path: Path) -> None:
    write_reliability_records(tmp_path)
    table = tables.operation.resumed_runs(trainer_benchmarks(tmp_path))
    assert table["compared with a whole run"].tolist() == ["a second whole run", "killed and resumed"]
    assert table["weights equal"].tolist() == ["31.20%", "31.20%"]
    assert table["first step whose loss differs"].tolist() == ["333", "333"]


def test_a_gap_stands_beside_the_runs_that_diverged(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for recipe in ("bf16", "fused"):
            folder = write_run(tmp_path, "pilot-h200", SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
    (before,) = tables.losses.loss_gaps(losses.measured_gaps(losses.measured_sets(tmp_path))).to_dict("records")
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged", "final": None}))
    gaps = losses.measured_gaps(losses.measured_sets(tmp_path))
    (row,) = tables.losses.loss_gaps(gaps).to_dict("records")
    assert (before["diverged"], row["diverged"], row["seeds"]) == ("none", "1 FP8", 2)
    assert row["so"].endswith(", of those that finished")
    assert "Runs that diverged and are in no mean: 1 of `fused` at 0.4M." in losses.sources(gaps)


def test_a_spike_score_stands_beside_the_steps_that_it_judged(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "demo", SIZES[0], "bf16")
    assert tables.health.spikes([plan_runs(tmp_path, "demo")])["steps judged"].tolist() == ["40 of 60"]
    record = records.read(folder)
    assert isinstance(record, records.TrainRecord)
    assert record.stability is not None
    record.stability.judged_steps = None
    records.write(record, tmp_path)
    assert tables.health.spikes([plan_runs(tmp_path, "demo")])["steps judged"].tolist() == ["unknown"]


def test_what_diverged_and_was_skipped_is_counted_in_every_plan_and_branch(tmp_path: Path) -> None:
    stable = write_run(tmp_path, "pilot-h200", SIZES[0], "fused")
    branch = write_run(tmp_path, "pilot-h200", SIZES[0], "fused", budget=1, branch_of=stable.name)
    other = write_run(tmp_path, "seeds-h200", SIZES[0], "fused", seed=2)
    for folder, skipped in ((branch, 10), (other, 100)):
        path = folder / "record.json"
        values = json.loads(path.read_text()) | {"status": "diverged", "final": None}
        values["stability"]["skipped_steps"] = skipped
        path.write_text(json.dumps(values))
    (row,) = tables.health.spikes([plan_runs(tmp_path, plan) for plan in ("pilot-h200", "seeds-h200")]).to_dict(
        "records"
    )
    assert (row["runs"], row["diverged"], row["skipped steps"]) == (2, 2, 111)
