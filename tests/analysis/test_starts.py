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
from fp8lab.analysis.comparison import Gap
from fp8lab.config import Recipe, ScheduleConfig
from fp8lab.errors import UserError
from fp8lab.frontpage import Evidence, conclusions, costs
from fp8lab.schedule import decay_start
from fp8lab.units import signed, small_percent
from tests.fixtures import SIZES, STEPS, write_early_change, write_early_records, write_run

E5M2 = {"gradient_format": "e5m2"}
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
    (start,) = (start for start in starts.starts(starts.early_runs(root)) if not start.ours.changed_settings)
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
        assert losses[recipe, seed] - losses["bf16", seed] == pytest.approx(gap, abs=6e-4)
    _, fused = starts.by_setting(begun)
    told = " and ".join(signed(start.gap, 3) for start in fused)
    assert starts.gaps_text(fused) == f"{told} nats (seeds 1 and 2) with `fused` at 0.4M"
    assert starts.baseline_spread(begun, "0.4M") == pytest.approx(
        abs(losses["bf16", "1"] - losses["bf16", "2"]), abs=1e-4
    )
    assert starts.left_out(starts.early_runs(tmp_path)).endswith("in no gap: `0.4M-fused-s3`.")


def write_pairs(root: Path, *seeds: int) -> None:
    """BF16 and `fused` of seeds 1 and 2, and `fused` with E5M2 gradients of `seeds`."""
    for recipe, seed in (("bf16", 1), ("bf16", 2), ("fused", 1), ("fused", 2)):
        write_run(root, "early-h200", SIZES[0], recipe, seed=seed, budget=1, device_name="NVIDIA H200")
    for seed in seeds:
        write_early_change(root, SIZES[0], "e5m2", E5M2, seed=seed)


def test_a_change_of_a_recipe_is_compared_with_its_defaults_on_the_same_seed(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2, 3)
    begun = starts.starts(starts.early_runs(tmp_path))
    ((change,),) = starts.pairs_with_defaults(begun)
    ends = {
        path.parent.name: json.loads(path.read_text())["final"]["validation_loss"]
        for path in tmp_path.glob("early-*/*/record.json")
    }
    assert change.gap == pytest.approx(ends["0.4M-fused-s2-e5m2"] - ends["0.4M-fused-s2"])
    assert starts.changes_text([change]).endswith(f"{-change.gap:.3f} nats below (seed 2) `fused` by its defaults")
    table = tables.runs.starts(begun)
    assert list(table["recipe"]) == ["bf16"] * 2 + ["fused"] * 2 + ["fused (gradient_format: e5m2)"]
    assert starts.gaps_text([change.changed]).endswith("(seed 2) with `fused` (`gradient_format: e5m2`) at 0.4M")


def test_a_start_is_drawn_beside_bf16_of_its_seed_with_its_gradients(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    begun = starts.starts(starts.early_runs(tmp_path))
    figure = figures.loss.starts(begun)
    top, middle, bottom = figure.axes
    assert len(top.get_lines()) == 5
    styles = [line.get_linestyle() for line in middle.get_lines()[: len(begun)]]
    assert styles == ["-", "-", "--"]
    for start, line, flushed in zip(begun, middle.get_lines(), bottom.get_lines(), strict=False):
        expected = (start.ours.training_curve() - start.baseline.training_curve()).to_numpy()
        assert line.get_ydata() == pytest.approx(expected)
        assert flushed.get_ydata() == pytest.approx(100 * diagnosis.flushed_gradients(start.ours).to_numpy())
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["bf16", "fused", "fused (gradient_format: e5m2)"]


def test_an_output_head_in_fp8_is_another_setting(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    path = tmp_path / "early-gradients-h200" / "0.4M-fused-s2-e5m2" / "record.json"
    record = json.loads(path.read_text())
    record["head"] = "fp8"
    path.write_text(json.dumps(record))
    begun = starts.starts(starts.early_runs(tmp_path))
    assert starts.pairs_with_defaults(begun) == []
    assert begun[-1].ours.named == "`fused` (`gradient_format: e5m2`, output head in FP8)"


def test_a_run_of_another_design_is_no_start_beside_these_and_is_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    path = tmp_path / "early-gradients-h200" / "0.4M-fused-s2-e5m2" / "record.json"
    record = json.loads(path.read_text())
    record["config"]["optimizer"]["peak_learning_rate"] /= 2
    path.write_text(json.dumps(record))
    early = starts.early_runs(tmp_path)
    assert [start.ours.named for start in starts.starts(early)] == ["`fused`", "`fused`"]
    assert "in no gap: `0.4M-fused-s2-e5m2`." in starts.left_out(early)


def test_two_runs_of_bf16_that_could_stand_beside_one_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    again = write_run(tmp_path, "early-gradients-h200", SIZES[0], "bf16", budget=1, device_name="NVIDIA H200")
    with pytest.raises(UserError, match=f"{again.name} and {again.name} could stand beside it"):
        starts.starts(starts.early_runs(tmp_path))


@pytest.mark.parametrize(("fewer", "tells"), [(1, 2), (2, 1)])
def test_of_several_seeds_the_one_with_most_measurements_tells_of_a_setting(
    tmp_path: Path, fewer: int, tells: int
) -> None:
    write_pairs(tmp_path, 2)
    folder = tmp_path / "early-h200" / f"0.4M-fused-s{fewer}"
    table = records.read_table(folder, "health")
    records.write_table(folder, "health", table[table["step"] == table["step"].max()])
    fused = starts.early_runs(tmp_path).where(recipe="fused")
    measured = [(run.record.seed, run.changed_settings) for run in diagnosis.measured(fused)]
    assert measured == [(tells, ""), (2, "gradient_format: e5m2")]


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
    assert f"{signed(start.gap, 3)} nats/token (seed 1) with `fused` at 0.4M, 1.25 × the tokens." in said


def formats_told(root: Path) -> str:
    told = [said for said in conclusions(Evidence.read(root)) if said.startswith("**Format of gradients.**")]
    return " ".join(told)


def test_what_e5m2_gradients_did_to_starts_is_told_with_every_pair_and_what_speaks_against_it(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1, 2)
    defaults = {}
    for seed, moved in ((1, 0.2), (2, -0.1)):
        default = json.loads((tmp_path / "early-h200" / f"0.4M-fused-s{seed}" / "record.json").read_text())
        defaults[seed] = default["final"]["validation_loss"]
        path = tmp_path / "early-gradients-h200" / f"0.4M-fused-s{seed}-e5m2" / "record.json"
        record = json.loads(path.read_text())
        record["final"]["validation_loss"] = defaults[seed] + moved
        path.write_text(json.dumps(record))
        table = records.read_table(path.parent, "health")
        table["underflow_fraction"] = table["underflow_fraction"].where(table["tensor"] != "grad_output", 0.0012)
        records.write_table(path.parent, "health", table)
    said = formats_told(tmp_path)
    assert "ended 0.200 nats above (seed 1) and 0.100 nats below (seed 2) `fused` by its defaults" in said
    before = max(
        diagnosis.flushed_gradients(run).max()
        for run in starts.early_runs(tmp_path).where(recipe="fused")
        if not run.changed_settings
    )
    assert "in the mean of all Linears, rounding flushed at most 0.12% of its gradients to zero, against " in said
    assert f"against {small_percent(before)} by its defaults" in said
    assert "@fig-start-0-4m" in said
    assert "train 0.4M with" not in said
    assert "explain" not in said
    bf16 = json.loads((tmp_path / "early-h200" / "0.4M-bf16-s2" / "record.json").read_text())["final"][
        "validation_loss"
    ]
    assert f" and {signed(defaults[2] - 0.1 - bf16, 3)} nats (seeds 1 and 2) with `fused` (`gradient_format" in said
    write_run(tmp_path, "early-h200", SIZES[0], "tensorwise", budget=1, device_name="NVIDIA H200")
    assert "explain" not in formats_told(tmp_path), "one of the pairs says that the format does harm"


@pytest.mark.parametrize(("moved", "recommended"), [((-0.2, -0.3, -0.25), True), ((-0.2, 0.3, -0.25), False)])
def test_three_seeds_are_told_by_their_mean_and_recommend_e5m2_only_if_they_agree(
    tmp_path: Path, moved: tuple[float, ...], recommended: bool
) -> None:
    write_pairs(tmp_path, 1, 2, 3)
    ends: dict[str, list[float]] = {"bf16": [], "fused": [], "changed": []}
    for seed, by in zip((1, 2, 3), moved, strict=True):
        for recipe, loss in (("bf16", 3 + 0.01 * seed), ("fused", 3.3 - 0.02 * seed)):
            run = write_run(tmp_path, "early-h200", SIZES[0], recipe, seed=seed, budget=1, device_name="NVIDIA H200")
            set_end(run, loss)
            ends[recipe].append(loss)
        set_end(tmp_path / "early-gradients-h200" / f"0.4M-fused-s{seed}-e5m2", ends["fused"][-1] + by)
        ends["changed"].append(ends["fused"][-1] + by)
    said = formats_told(tmp_path)
    assert f"ended {Gap.between(ends['changed'], ends['fused'])} from `fused` by its defaults" in said
    assert f"FP8 − BF16 is then {Gap.between(ends['changed'], ends['bf16'])} with `fused` (`gradient" in said
    assert ("train 0.4M with E5M2 gradients" in said) == recommended
    assert f"{Gap.between(ends['fused'], ends['bf16']).text('nats/token')} with `fused` at" in costs(
        Evidence.read(tmp_path)
    )


def set_end(run: Path, loss: float) -> None:
    record = json.loads((run / "record.json").read_text())
    record["final"]["validation_loss"] = loss
    (run / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize("above", [True, False])
def test_a_recipe_with_e5m2_gradients_that_starts_worse_says_that_they_are_not_all(tmp_path: Path, above: bool) -> None:
    write_pairs(tmp_path, 1)
    path = (
        write_run(tmp_path, "early-h200", SIZES[0], "tensorwise", budget=1, device_name="NVIDIA H200") / "record.json"
    )
    record = json.loads(path.read_text())
    record["final"]["validation_loss"] += 0.5 if above else -0.5
    path.write_text(json.dumps(record))
    said = "with `tensorwise` at 0.4M, whose gradients are in E5M2 too: the format alone does not explain"
    assert (said in formats_told(tmp_path)) == above


def test_gradients_are_compared_where_both_runs_measured_them(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    folder = tmp_path / "early-h200" / "0.4M-fused-s1"
    table = records.read_table(folder, "health")
    records.write_table(folder, "health", table[table["step"] == table["step"].max()])
    ((change,),) = starts.pairs_with_defaults(starts.starts(starts.early_runs(tmp_path)))
    assert len(change.flushed) == 1
    assert change.flushed.index[0] == diagnosis.flushed_gradients(change.default.ours).index[0]


def test_other_changes_say_nothing_of_formats(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    assert formats_told(tmp_path) == ""
    write_early_change(tmp_path, SIZES[0], "history4", {"history": 4})
    assert formats_told(tmp_path) == ""


def test_without_health_the_format_is_told_by_its_losses_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    for path in tmp_path.glob("early-*/*/health.parquet"):
        path.unlink()
    said = formats_told(tmp_path)
    assert "below (seed 1) `fused` by its defaults (@fig-start-0-4m)" in said


def test_a_start_on_a_cpu_is_no_measurement(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "early-h200", SIZES[0], recipe, budget=1)
    assert not starts.early_runs(tmp_path)
    assert starts.starts(starts.early_runs(tmp_path)) == []
