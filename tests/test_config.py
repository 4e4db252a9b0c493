"""Configurations: what a user may write, and what one line a mistake answers with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.config import MODELS, load_plan, load_run, parameter_count
from fp8lab.errors import UserError
from fp8lab.model import GPT

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


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"micro_batch": "two"}, "micro_batch", "integer"),
        ({"learning_rate": 1}, "learning_rate", "accepted: models, recipes"),
        ({"seed": 5}, "seed", "accepted: models, recipes, seeds"),
        ({"suffix": 3}, "suffix", "string"),
        ({"tokens_per_parameter": float("inf")}, "tokens_per_parameter", "finite"),
        ({"optimizer": {"peak_learning_rate": 0.1, "lr": 1}}, "optimizer.lr", "accepted: peak_learning_rate"),
        ({"models": [TINY | {"n_heads": 3}]}, "models", "not divisible by n_heads 3"),
        ({"models": ["126M"]}, "models", "known: 7M"),
        ({"recipes": ["fp9"]}, "recipes.0", "'bf16', 'tensorwise', 'rowwise', 'rowwise_with_gw_hp' or 'fused'"),
        ({"global_batch_tokens": 50}, "", "not a multiple of micro_batch x seq_len"),
        ({"tokens_per_parameter": 2}, "tokens", "not both"),
        ({"suffix": "/../../x"}, "run", "pattern"),
        ({"seeds": [-1]}, "seed", "greater than or equal to 0"),
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
