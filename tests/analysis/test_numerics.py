"""Variants of fused: what each is compared with, and what they leave the quietest design to say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fp8lab import tables
from fp8lab.analysis import losses, numerics, variance
from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.runs import plan_runs
from fp8lab.analysis.trouble import training_key
from fp8lab.config import FusedConfig, Recipe
from fp8lab.frontpage.conclusions import conclusions
from fp8lab.frontpage.evidence import Evidence
from fp8lab.plan import load_plan
from fp8lab.units import signed
from tests.fixtures import (
    LADDER,
    NUMERICS_VARIANTS,
    SIZES,
    Measured,
    write_ladder_records,
    write_numerics_records,
    write_run,
    write_variance_records,
)

PLANS = Path(__file__).parents[2] / "runs" / "plans"


@pytest.fixture
def records_dir(tmp_path: Path) -> Path:
    write_variance_records(tmp_path, measured=Measured(seeds=8))
    write_numerics_records(tmp_path, measured=Measured(seeds=8))
    return tmp_path


def named(variants: list[numerics.Variant]) -> dict[tuple[str, str], numerics.Variant]:
    """Those with their head in BF16."""
    return {(variant.recipe, variant.changed_settings): variant for variant in variants if variant.head == "bf16"}


def test_variants_stand_beside_the_studys_runs_of_their_design_alone(records_dir: Path) -> None:
    found = named(numerics.variants(records_dir, "numerics-h200"))
    assert set(found) == {
        ("bf16", ""),
        ("fused", ""),
        ("tensorwise", ""),
        ("fused", "fast_accumulation: output, grad_input"),
        ("fused", "gradient_format: e5m2"),
    }
    study = variance.study(records_dir)
    low_rate = next(cell for cell in study.cells if (cell.design, cell.averaged) == ("low-rate", False))
    for recipe in ("bf16", "fused"):
        assert found[recipe, ""].losses == low_rate.losses(recipe)
    stock = found["tensorwise", ""]
    assert found["fused", ""].minus(stock) == Gap.by_seed(low_rate.losses("fused"), stock.losses)


def test_the_table_has_each_difference_with_its_interval(records_dir: Path) -> None:
    variants = numerics.variants(records_dir, "numerics-h200")
    table = tables.losses.numerics(variants)
    assert len(table) == len(variants) == 2 + len(NUMERICS_VARIANTS)
    differences = [name.removesuffix(" (95% interval)") for name in table.columns if name.startswith("− ")]
    assert differences == ["− bf16", "− tensorwise", "− its BF16 head"]
    for (_, row), variant in zip(table.iterrows(), variants, strict=True):
        assert row["loss (nats/token)"] == f"{np.mean(list(variant.losses.values())):.4f}"
        by_head = {one.head: one for one in variants if (one.recipe, one.changed_settings) == ("tensorwise", "")}
        itself = named(variants)[variant.recipe, variant.changed_settings]
        for name, other in {"bf16": variants[0], "tensorwise": by_head[variant.head], "its BF16 head": itself}.items():
            shown = row[f"− {name} (95% interval)"]
            if other is variant or variant.recipe == "bf16":
                assert shown == "–"
                continue
            gap = variant.minus(other)
            assert gap.interval is not None
            assert shown == f"{signed(gap.mean)} ({signed(gap.interval[0])} to {signed(gap.interval[1])})"


def test_what_the_head_costs_is_told_beside_its_speed_from_most_seeds(records_dir: Path, monkeypatch) -> None:
    variants = numerics.variants(records_dir, "numerics-h200")
    fused, itself, bf16 = (numerics.find(variants, *kind) for kind in (("fused", "fp8"), ("fused",), ("bf16",)))
    costs = {cost.recipe: cost for cost in numerics.head_costs("numerics-h200", variants)}
    assert set(costs) == {"fused", "tensorwise"}
    assert costs["fused"].own == Gap.by_seed(fused.losses, itself.losses)
    assert costs["fused"].against_bf16 == Gap.by_seed(fused.losses, bf16.losses)
    # Seeds scatter by 0.004 nats: means of eight differ by what the fixture adds to within 0.004.
    assert costs["fused"].own.mean == pytest.approx(0.006, abs=0.004)
    for folder in records_dir.glob("numerics-h200/*-s1[12]-*"):
        copy = shutil.copytree(folder, records_dir / "few" / folder.name)
        (copy / "record.json").write_text(json.dumps(json.loads((copy / "record.json").read_text()) | {"plan": "few"}))
    monkeypatch.setattr(numerics, "REFERENCES", numerics.REFERENCES | {"few": "variance-h200"})
    assert {cost.own.seeds for cost in numerics.head_costs("few", numerics.variants(records_dir, "few"))} == {2}
    evidence = Evidence.read(records_dir)
    assert {cost.recipe: cost for cost in evidence.head_costs} == costs
    (head,) = [one for one in conclusions(evidence) if one.startswith("**Output head.**")]
    assert f"adds {costs['fused'].own.text()} to the loss of `fused`" in head
    assert f"{costs['fused'].against_bf16.text()} from BF16's (@tbl-numerics-h200)" in head


def test_a_plan_without_its_bf16_side_is_not_shown(tmp_path: Path) -> None:
    write_numerics_records(tmp_path)
    assert numerics.variants(tmp_path, "numerics-h200") == []
    assert numerics.variants(tmp_path, "candidates-h200") == []


def test_the_quietest_design_tells_what_each_recipe_costs_until_more_seeds_do(records_dir: Path) -> None:
    without_long_decay(records_dir)
    gaps = {gap.recipe: gap for gap in losses.measured_gaps(losses.measured_sets(records_dir))}
    assert set(gaps) == {"tensorwise", "fused"}
    found = named(numerics.variants(records_dir, "numerics-h200"))
    for recipe, measured in gaps.items():
        assert measured.gap.seeds == 8
        # A variant is not what the recipe costs.
        assert measured.gap.mean == found[recipe, ""].minus(found["bf16", ""]).mean
    table = tables.losses.loss_gaps(list(gaps.values())).set_index("recipe")
    assert table["plan"].to_dict() == {"tensorwise": "numerics-h200, variance-h200", "fused": "variance-h200"}


def test_runs_that_diverged_are_counted_beside_the_gap_of_the_rest(records_dir: Path) -> None:
    without_long_decay(records_dir)
    for run in ("variance-h200/0.4M-fused-s11-low-rate", "numerics-h200/0.4M-tensorwise-s12-stock"):
        path = records_dir / run / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged"}))
    gaps = {gap.recipe: gap for gap in losses.measured_gaps(losses.measured_sets(records_dir))}
    assert {recipe: (gap.diverged, gap.gap.seeds) for recipe, gap in gaps.items()} == {
        "tensorwise": (1, 7),
        "fused": (1, 7),
    }


def test_a_design_of_which_one_side_diverged_altogether_is_still_counted(records_dir: Path) -> None:
    without_long_decay(records_dir)
    for path in records_dir.glob("variance-h200/*-fused-*-low-rate/record.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged"}))
    sets = losses.measured_sets(records_dir)
    assert sum(run.record.status == "diverged" for runs in sets for run in runs.unfinished) == 8
    (fused,) = (gap for gap in losses.measured_gaps(sets) if gap.recipe == "fused")
    # What is left is the base design, of which none did.
    assert (fused.gap.seeds, fused.diverged) == (8, 0)


def without_long_decay(records_dir: Path) -> None:
    """Leave the study with low-rate as its quietest design, the one of the variants."""
    for path in records_dir.glob("variance-h200/*-long-decay/record.json"):
        path.unlink()


def test_what_a_record_does_not_say_is_how_fused_was_then_whatever_its_defaults_are_now(
    records_dir: Path, monkeypatch
) -> None:
    for path in records_dir.glob("variance-h200/*-fused-*/record.json"):
        values = json.loads(path.read_text())
        del values["config"]["fused"]
        path.write_text(json.dumps(values))
    assert ("fused", "") in named(numerics.variants(records_dir, "numerics-h200"))
    later = FusedConfig.model_construct(**FusedConfig().model_dump() | {"history": 4})
    monkeypatch.setattr("fp8lab.analysis.runs.FusedConfig", lambda: later)
    assert ("fused", "history: 16") in named(numerics.variants(records_dir, "numerics-h200"))


def test_a_training_is_known_again_by_what_it_computed(tmp_path: Path) -> None:
    def key(plan: str, recipe: Recipe, fused: dict[str, object] | None) -> str:
        path = write_run(tmp_path, plan, SIZES[0], recipe) / "record.json"
        values = json.loads(path.read_text())
        del values["config"]["fused"]
        values["config"] |= {} if fused is None else {"fused": fused}
        path.write_text(json.dumps(values))
        (run,) = plan_runs(tmp_path, plan).runs
        return training_key(run)

    ignored = {"fast_accumulation": ["output"]}
    assert key("a", "bf16", None) == key("b", "bf16", ignored), "BF16 has nothing of it"
    assert key("c", "fused", None) == key("d", "fused", FusedConfig().model_dump(mode="json"))
    assert key("e", "fused", ignored) != key("c", "fused", None)


def test_the_plans_train_in_one_design_and_candidates_on_seeds_that_did_not_choose_them() -> None:
    trained = {
        name: load_plan(PLANS / f"{name}.yaml").runs for name in (*numerics.REFERENCES, "variance-h200", "seeds-h200")
    }
    low_rate = [run for run in trained["variance-h200"] if run.run.endswith("-low-rate")]
    seeds = [run for run in trained["seeds-h200"] if run.model.name == "7M"]
    design = ("model", "tokens", "optimizer", "schedule", "global_batch_tokens", "mixture")
    for ours, references in (("numerics-h200", low_rate), ("candidates-h200", seeds)):
        assert {run.seed for run in trained[ours]} == {run.seed for run in references}
        for field in design:
            assert {repr(getattr(run, field)) for run in (*trained[ours], *references)} == {
                repr(getattr(seeds[0], field))
            }
    assert not {run.seed for run in trained["candidates-h200"]} & {run.seed for run in trained["numerics-h200"]}


def test_the_ladders_runs_of_the_same_size_stand_beside_a_variant_of_its_largest(tmp_path: Path) -> None:
    assert load_plan(PLANS / "gradients-h200.yaml").name in numerics.REFERENCES
    write_ladder_records(tmp_path)
    folder = write_run(
        tmp_path, "gradients-h200", LADDER[-1], "fused", budget=20, final_loss=2.5, device_name="NVIDIA H200"
    )
    record = json.loads((folder / "record.json").read_text())
    record["config"]["fused"]["gradient_format"] = "e5m2"
    (folder / "record.json").write_text(json.dumps(record))
    found = named(numerics.variants(tmp_path, "gradients-h200"))
    assert set(found) == {("bf16", ""), ("tensorwise", ""), ("fused", ""), ("fused", "gradient_format: e5m2")}
    assert {variant.size for variant in found.values()} == {"48M"}
    ladder = plan_runs(tmp_path, "ladder-h200")
    assert found["bf16", ""].losses == {1: ladder.where(size="48M", recipe="bf16")[0].validation_loss}
    difference = found["fused", "gradient_format: e5m2"].minus(found["fused", ""])
    default = ladder.where(size="48M", recipe="fused")[0].validation_loss
    assert difference.mean == pytest.approx(record["final"]["validation_loss"] - default)
    assert difference.interval is None
