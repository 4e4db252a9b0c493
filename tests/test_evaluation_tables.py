"""Scores in the article's tables: ours, and those that others published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fp8lab import records, tables
from fp8lab.analysis import scores
from fp8lab.analysis.runs import Run, RunSet, scored_runs
from tests.fixtures import SIZES, write_run

TASKS = ("hellaswag", "sciq", "mmlu")
FULL: dict[str, Any] = {
    "results": {
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 1234.5, "word_perplexity_stderr,none": "N/A"},
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.26, "acc_norm,none": 0.27, "acc_norm_stderr,none": 0.004},
        "sciq": {"alias": "sciq (validation split)", "acc,none": 0.4, "acc_stderr,none": 0.015},
        "mmlu": {"alias": "mmlu", "acc,none": 0.23, "acc_stderr,none": 0.003},
        "mmlu_anatomy": {"alias": "anatomy", "acc,none": 0.2, "acc_stderr,none": 0.03},
    },
    "group_subtasks": {"mmlu": ["mmlu_anatomy"]},
    "n-samples": {task: {"original": 1000, "effective": 1000} for task in ("wikitext", *TASKS, "mmlu_anatomy")},
    "random_guess": dict.fromkeys((*TASKS, "mmlu_anatomy"), 0.25),
    "config": {"limit": None},
    "data": {"tasks": {"sciq": {"split": "validation", "note": "validation split; the task's own is test"}}},
}


def scored(records_dir: Path, evaluation: dict[str, Any]) -> RunSet:
    """One finished run with these scores."""
    folder = write_run(records_dir, "demo", SIZES[0], "bf16")
    (folder / "eval.json").write_text(json.dumps(evaluation))
    return RunSet("demo", (Run(folder, records.read(folder)),))


def test_a_group_is_one_task_and_another_split_is_named(tmp_path: Path) -> None:
    table = scores.of_runs(scored(tmp_path, FULL))
    assert set(table["task"]) == {"wikitext", "hellaswag", "sciq (validation split)", "mmlu"}
    assert (table.set_index(["task", "metric"])["random_guess"].dropna() == 0.25).all()
    headings = list(tables.scores.score_table(scored(tmp_path, FULL)).columns)
    assert "sciq (validation split) (acc)" in headings


@pytest.mark.parametrize("name", ["eval-tensorwise.json", "eval.json"])
def test_scores_in_an_fp8_recipe_are_in_no_table(tmp_path: Path, name: str) -> None:
    """Not even where an earlier version wrote them to eval.json."""
    runs = scored(tmp_path, FULL)
    (folder,) = (run.folder for run in runs.runs)
    (folder / "eval.json").unlink()
    (folder / name).write_text(json.dumps(FULL | {"config": {"suite": "full", "precision": "tensorwise"}}))
    assert scores.of_runs(runs).empty
    assert not scored_runs(tmp_path)


def test_every_published_score_has_a_source_and_a_protocol() -> None:
    published = scores.published_scores()
    assert len(published) > 500
    sourced = ["model", "params", "task", "metric", "value", "shots", "protocol", "source_title", "source_url"]
    assert not published[sourced].isna().any(axis=None)
    assert published["source_url"].str.startswith("https://").all()
    accuracies = published[published["metric"].isin(("acc", "acc_norm"))]
    assert accuracies["value"].between(0, 100).all()
    assert not published.duplicated(["model", "task", "metric", "value", "shots", "protocol"]).any()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("A", "1B", "3T", "hellaswag", "acc", 40.0, "0", "lm-eval"),
        ("A", "1B", "3T", "hellaswag", "acc_norm", 50.0, "0", "lm-eval"),
        ("A", "1B", "3T", "hellaswag", "acc", 70.0, "10", "Own"),
        ("B", "2B", None, "hellaswag", "acc", 41.0, "0", "lm-eval"),
        ("B", "2B", None, "sciq", "acc", 80.0, "0", "Own"),
        ("B", "2B", None, "mmlu", "acc", 60.0, "5", "Own"),
        ("B", "2B", None, "sciq", "perplexity", 9.0, "0", "lm-eval"),
    ]
    columns = ["model", "params", "train_tokens", "task", "metric", "value", "shots", "protocol"]
    frame = pd.DataFrame(rows, columns=columns)
    monkeypatch.setattr(scores, "published_scores", lambda: frame)


@pytest.mark.usefixtures("published")
def test_a_figure_of_another_protocol_is_marked() -> None:
    table = tables.scores.published_comparison(TASKS, ("A", "B", "nobody")).set_index("model")
    assert list(table.index) == ["random guess", "A", "B"]
    assert table.loc["random guess", "mmlu (acc)"] == "25"
    assert list(table.loc["A"]) == ["1B", "3T", "50.0", "–", "–"]
    assert list(table.loc["B"]) == ["2B", "–", "41.0ᵃ", "80.0ᵇ", "60.0ᵇᶜ"]
    assert set("ᵃᵇᶜᵈ") == tables.scores.PUBLISHED_MARKS.keys()


@pytest.mark.usefixtures("published")
def test_our_own_runs_stand_beside_them_with_their_errors(tmp_path: Path) -> None:
    table = tables.scores.published_comparison(TASKS, ("A",), scored(tmp_path, FULL))
    assert list(table["model"]) == ["random guess", f"this project, {SIZES[0].name} bf16", "A"]
    assert list(table.iloc[1][["hellaswag (acc_norm)", "sciq (acc)", "mmlu (acc)"]]) == [
        "27.0 ± 0.4",
        "40.0 ± 1.5ᵈ",
        "23.0 ± 0.3",
    ]


@pytest.mark.usefixtures("published")
def test_scores_of_a_part_of_the_items_are_not_compared(tmp_path: Path) -> None:
    part = FULL | {"config": {"limit": 20}}
    table = tables.scores.published_comparison(TASKS, ("A",), scored(tmp_path, part))
    assert list(table["model"]) == ["random guess", "A"]


@pytest.mark.usefixtures("published")
def test_random_guessing_alone_is_no_comparison() -> None:
    assert tables.scores.published_comparison(TASKS, ("nobody",)).empty


def test_a_published_figure_is_found_by_its_protocol(published: None) -> None:
    assert scores.published_accuracy("A", "hellaswag", "Own", 10) == 70
    assert scores.published_accuracy("A", "hellaswag", "lm-eval", metric="acc_norm") == 50
    with pytest.raises(KeyError, match="no acc of A on sciq, 5-shot by lm-eval"):
        scores.published_accuracy("A", "sciq", "lm-eval", 5)


def test_bits_of_answers_are_of_tasks_and_groups_not_of_members(tmp_path: Path) -> None:
    bits = {"bits_per_byte": 1.25, "bits_per_byte_stderr": 0.05}
    answers = {"answers": dict.fromkeys(("hellaswag", "sciq", "mmlu", "mmlu_anatomy"), bits)}
    [row] = tables.scores.answer_bits(scored(tmp_path, FULL | answers)).to_dict("records")
    assert row == {"model": SIZES[0].name, "recipe": "bf16"} | dict.fromkeys(
        ("hellaswag", "sciq (validation split)", "mmlu"), "1.250 ± 0.050"
    )
    assert tables.scores.answer_bits(scored(tmp_path, FULL)).empty


def test_a_score_is_compared_with_bf16s_of_its_size_seed_and_task() -> None:
    rows = [
        ("7M", "bf16", 1, 20, "sciq", 0.50, 0.03),
        ("7M", "fused", 1, 20, "sciq", 0.62, 0.04),
        ("7M", "fused", 1, 10, "sciq", 0.7, 0.04),
        ("7M", "fused", 2, 20, "sciq", 0.9, 0.01),
        ("7M", "fused", 1, 20, "piqa", 0.9, 0.01),
        ("13M", "bf16", 1, 20, "piqa", 0.2, 0.01),
    ]
    table = pd.DataFrame(rows, columns=["size", "recipe", "seed", "tokens", "task", "value", "stderr"])
    [row] = scores.differences(table).to_dict("records")
    assert (row["recipe"], row["size"], row["seed"], row["task"]) == ("fused", "7M", 1, "sciq")
    assert (row["difference"], row["noise"]) == (pytest.approx(0.12), pytest.approx(0.05))
