"""Configurations: what a user may write, and what one line a mistake answers with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.config import MODELS, UNSAID_FUSED, FusedConfig, earlier_config, parameter_count, recorded_fused
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.plan import load_plan, load_run
from fp8lab.schedule import decay_start, warmup_steps

TINY = {"name": "tiny", "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "vocab_size": 64, "seq_len": 16}
ENTRY: dict[str, Any] = {
    "models": [TINY],
    "recipes": ["bf16", "tensorwise"],
    "seeds": [1, 2],
    "mixture": "demo",
    "tokens": 1024,
    "global_batch_tokens": 64,
    "micro_batch": 2,
    "optimizer": {"peak_learning_rate": 0.001},
}


def write_plan(folder: Path, entry: dict[str, Any], **top: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"name": "p", "description": "d", "entries": [entry]} | top))
    return path


def test_an_entry_is_the_product_of_models_recipes_and_seeds(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path, ENTRY))
    assert [config.run for config in plan.runs] == [
        "tiny-bf16-s1",
        "tiny-bf16-s2",
        "tiny-tensorwise-s1",
        "tiny-tensorwise-s2",
    ]
    assert plan["tiny-bf16-s2"].seed == 2
    assert plan.runs[0].steps == 16


def test_entries_override_defaults_field_by_field(tmp_path: Path) -> None:
    entry = {"models": [TINY], "recipes": ["bf16"], "optimizer": {"weight_decay": 0.0}}
    defaults = {key: ENTRY[key] for key in ENTRY if key not in entry} | {"optimizer": ENTRY["optimizer"]}
    defaults.pop("seeds")
    (config,) = load_plan(write_plan(tmp_path, entry, defaults=defaults)).runs
    assert config.optimizer.peak_learning_rate == 0.001
    assert config.optimizer.weight_decay == 0.0


def test_tokens_per_parameter_counts_every_parameter_once(tmp_path: Path) -> None:
    entry = {key: value for key, value in ENTRY.items() if key != "tokens"}
    plan = load_plan(write_plan(tmp_path, entry | {"tokens_per_parameter": 20}))
    model = plan.runs[0].model
    assert plan.runs[0].tokens == 20 * sum(p.numel() for p in GPT(model).parameters())


@given(
    budgets=st.lists(st.sampled_from([1.5, 2.5, 5, 8, 10, 15]), min_size=1, max_size=3, unique=True),
    warmup=st.floats(0.0, 0.05),
    decay=st.floats(0.05, 0.3),
)
def test_decay_branches_share_the_stable_part_and_pay_only_their_decay(
    tmp_path_factory: pytest.TempPathFactory, budgets: list[float], warmup: float, decay: float
) -> None:
    entry = {key: value for key, value in ENTRY.items() if key != "tokens"}
    entry |= {"models": ["7M"], "global_batch_tokens": 131_072, "micro_batch": 128, "tokens_per_parameter": 20}
    entry |= {"schedule": {"kind": "wsd", "warmup_fraction": warmup, "decay_fraction": decay}}
    entry |= {"decay_branches_at": budgets, "evaluation": "full", "average_half_life": 0.1}
    plan = load_plan(write_plan(tmp_path_factory.mktemp("plan"), entry))
    parameters = parameter_count(MODELS["7M"])
    parents = [config for config in plan.runs if config.parent is None]
    assert len(plan.runs) == len(parents) * (1 + len(budgets)) == 4 * (1 + len(budgets))
    for parent in parents:
        branches = [plan[f"{parent.run}-d{budget:g}"] for budget in budgets]
        assert set(parent.keep_checkpoints_at) == {branch.parent.step for branch in branches if branch.parent}
        assert parent.evaluation == "full"
        for branch, budget in zip(branches, budgets, strict=True):
            assert branch.parent is not None
            assert branch.parent.run == parent.run
            assert branch.tokens == round(budget * parameters)
            assert branch.parent.step == decay_start(branch.schedule, branch.steps)
            assert branch.own_steps == max(1, round(decay * branch.steps))
            assert warmup_steps(branch.schedule, branch.steps) == warmup_steps(parent.schedule, parent.steps)
            assert (branch.recipe, branch.seed, branch.optimizer) == (parent.recipe, parent.seed, parent.optimizer)
            assert (branch.evaluation, branch.average_half_life) == ("none", 0)


def test_the_ladder_costs_23_tokens_a_parameter(tmp_path: Path) -> None:
    plan = load_plan(Path("runs/plans/ladder-h200.yaml"))
    for model in ("7M", "13M", "19M", "28M", "48M"):
        runs = [config for config in plan.runs if config.run.startswith(f"{model}-bf16-s1")]
        own = sum(config.own_steps * config.global_batch_tokens for config in runs)
        assert own / parameter_count(MODELS[model]) == pytest.approx(23, abs=0.1)


def test_the_learning_rate_falls_with_width(tmp_path: Path) -> None:
    entry = ENTRY | {"models": ["7M", "48M"], "optimizer": {"weight_decay": 0.2}, "recipes": ["bf16"], "seeds": [1]}
    entry |= {"global_batch_tokens": 1024, "micro_batch": 1, "learning_rate_at_width_256": 0.003}
    small, large = load_plan(write_plan(tmp_path, entry)).runs
    assert small.optimizer.peak_learning_rate == pytest.approx(0.003)
    assert large.optimizer.peak_learning_rate == pytest.approx(0.003 * 256 / 576)
    assert large.optimizer.weight_decay == 0.2


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"micro_batch": "two"}, "micro_batch", "integer"),
        ({"learning_rate": 1}, "learning_rate", "accepted: models, recipes"),
        ({"seed": 5}, "seed", "accepted: models, recipes, seeds"),
        ({"suffix": 3}, "suffix", "string"),
        ({"mixture": "mixtures/[mine].yaml"}, "mixture", "'[' cannot be in a record"),
        ({"tokens_per_parameter": float("inf")}, "tokens_per_parameter", "finite"),
        ({"optimizer": {"peak_learning_rate": 0.1, "lr": 1}}, "optimizer.lr", "accepted: peak_learning_rate"),
        ({"models": [TINY | {"n_heads": 3}]}, "models", "not divisible by n_heads 3"),
        ({"models": ["126M"]}, "models", "known: 7M"),
        ({"recipes": ["fp9"]}, "recipes.0", "'bf16', 'tensorwise', 'rowwise', 'rowwise_with_gw_hp' or 'fused'"),
        ({"global_batch_tokens": 50}, "", "not a multiple of micro_batch x seq_len"),
        ({"tokens_per_parameter": 2}, "tokens", "not both"),
        ({"suffix": "/../../x"}, "run", "pattern"),
        ({"seeds": [-1]}, "seed", "greater than or equal to 0"),
        ({"learning_rate_at_width_256": 0.003}, "optimizer.peak_learning_rate", "not both"),
        (
            {"schedule": {"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.8}},
            "schedule",
            "warmup_fraction 0.5 and decay_fraction 0.8 add up to more than 1",
        ),
        # 16 steps; the branch decays from the 12th on.
        (
            {"schedule": {"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.25}, "parent": {"step": 7}},
            "",
            "parent.step 7 is before this run's warm-up ends, at step 8 of 16",
        ),
        (
            {"schedule": {"kind": "wsd"}, "parent": {"step": 7}, "average_half_life": 0.1},
            "",
            "average_half_life: give none with parent",
        ),
        ({"decay_branches_at": [0]}, "decay_branches_at.0", "greater than 0"),
        ({"decay_branches_at": [0.05]}, "", "needs schedule.kind wsd"),
        ({"decay_branches_at": [0.2], "schedule": {"kind": "wsd"}}, "decay_branches_at", "not in its stable part"),
        (
            {"decay_branches_at": [0.005], "schedule": {"kind": "wsd", "warmup_fraction": 0.5}},
            "decay_branches_at",
            "would leave tiny-bf16-s1 at step 0",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(
    tmp_path: Path, change: dict[str, Any], field: str, says: str
) -> None:
    path = write_plan(tmp_path, ENTRY | change)
    with pytest.raises(UserError) as error:
        load_plan(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: entries[0]: {field}")
    assert says in message


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "!!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"plan\.yaml"):
        load_plan(path)


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_plan(tmp_path, ENTRY | {"seeds": [1, 1]})
    with pytest.raises(UserError, match="appears 2 times"):
        load_plan(path)


def test_a_saved_configuration_is_the_run_again(tmp_path: Path) -> None:
    config = load_plan(write_plan(tmp_path, ENTRY)).runs[0]
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_run(path, config.run) == config
    path.write_text(config.model_dump_json()[:-10])
    with pytest.raises(UserError, match="truncated"):
        load_run(path, config.run)


@given(st.sampled_from(sorted(MODELS)))
def test_named_models_are_as_large_as_their_names(name: str) -> None:
    scale = {"M": 1e6, "B": 1e9}[name[-1]]
    assert parameter_count(MODELS[name]) == pytest.approx(float(name[:-1]) * scale, rel=0.035)


@pytest.mark.parametrize("path", sorted(Path("runs/plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_plans_are_valid(path: Path) -> None:
    if "speed" in path.stem:
        from fp8lab.speed import load_speed_plan

        load_speed_plan(path)
    else:
        assert load_plan(path).runs


def test_only_names_that_match_are_left(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path, ENTRY | {"seeds": [1, 2, 3]}))
    names = [config.run for config in plan.runs]
    assert plan.only([]).runs == plan.runs
    assert [config.run for config in plan.only(["*-s1", "*-s[3-9]"]).runs] == [
        name for name in names if not name.endswith("-s2")
    ]
    with pytest.raises(UserError, match=r"--only: 'x\*' matches no run .* it has .*-s1"):
        plan.only(["*-s1", "x*"])


@pytest.mark.parametrize("change", [{"evaluation": "full"}, {"keep_checkpoints_at": [1]}])
def test_a_compact_run_has_nothing_to_score_or_branch_from(tmp_path: Path, change: dict) -> None:
    with pytest.raises(UserError, match="compact: keeps no weights"):
        load_plan(write_plan(tmp_path, ENTRY | {"compact": True} | change))


def test_how_fused_computes_is_said_of_fused_alone_and_in_one_order(tmp_path: Path) -> None:
    entry = ENTRY | {"recipes": ["fused"], "fused": {"fast_accumulation": ["grad_input", "output", "output"]}}
    config = load_plan(write_plan(tmp_path, entry)).runs[0]
    assert config.fused == FusedConfig(fast_accumulation=("output", "grad_input"))
    with pytest.raises(UserError, match="fused: recipe bf16 would ignore it"):
        load_plan(write_plan(tmp_path, entry | {"recipes": ["bf16", "fused"]}))
    with pytest.raises(UserError, match=r"fused\.history: .*greater than 0"):
        load_plan(write_plan(tmp_path, entry | {"fused": {"history": 0}}))


def test_a_recorded_run_computed_as_it_did_then_whatever_the_defaults_are_now(tmp_path: Path) -> None:
    bf16, fused = (
        load_plan(write_plan(tmp_path, ENTRY | {"recipes": [recipe]})).runs[0].model_dump()
        for recipe in ("bf16", "fused")
    )
    assert UNSAID_FUSED.keys() == FusedConfig.model_fields.keys(), "no default of today stands in"
    changed = {"fast_accumulation": ("output",), "history": 3}
    # A default of that time, which a run that ignored it has recorded too.
    assert earlier_config(bf16 | {"fused": changed}, "record") == earlier_config(bf16, "record")
    assert recorded_fused(bf16 | {"fused": changed}) is None
    del fused["fused"]
    assert earlier_config(fused, "record").fused == recorded_fused(fused) == FusedConfig.model_validate(UNSAID_FUSED)
    assert earlier_config(fused | {"fused": changed}, "record").fused.history == 3
    assert recorded_fused(fused | {"fused": changed}) == FusedConfig.model_validate(UNSAID_FUSED | changed)
