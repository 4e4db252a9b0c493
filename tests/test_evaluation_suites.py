"""Suites end to end on a small random model, with the network cut: what is asked, and what is written."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from fp8lab import evaluation
from fp8lab.errors import UserError
from fp8lab.evaluation import answers, run_suite, score_table
from fp8lab.evaluation.adapter import GPTAdapter
from fp8lab.evaluation.suites import OURS, Suite, demo_suite, full_suite_from_files, full_suite_from_hub
from tests.evaluation_items import ITEMS, write_items
from tests.small_gpt import TEXT, make_encoding, make_model

ELEVEN = {
    "wikitext",
    "lambada_openai",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "sciq",
    "boolq",
    "piqa",
    "winogrande",
    "mmlu",
}


@pytest.fixture(autouse=True, scope="module")
def _no_network() -> Any:
    def refuse(*address: object) -> None:
        raise AssertionError(f"looked for a host: {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket, "create_connection", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        yield


class HeldOut:
    """What `demo_suite` takes of a data set."""

    encoding = make_encoding()
    weights = MappingProxyType({"prose": 0.75, "code": 0.25})

    def validation_windows(self, domain: str, seq_len: int, max_tokens: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(len(domain))
        tokens: list[int] = []
        while len(tokens) <= 20 * seq_len:
            document = "".join(rng.choice(TEXT, size=rng.integers(1, 12)))
            tokens += [*self.encoding.encode_ordinary(document), self.encoding.eot_token]
        windows = np.array([tokens[at * seq_len : (at + 1) * seq_len + 1] for at in range(20)])
        return windows, 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return demo_suite(tmp_path_factory.mktemp("demo"), HeldOut())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("full")
    return full_suite_from_files(folder, write_items(tmp_path_factory.mktemp("items")))


@pytest.fixture
def adapter() -> GPTAdapter:
    return GPTAdapter(make_model(), make_encoding(), bf16=False)


@pytest.fixture(scope="module")
def full_result(full: Suite) -> dict[str, Any]:
    return run_suite(GPTAdapter(make_model(), make_encoding(), bf16=False), full)


def loglikelihood(context: str, continuation: str) -> float:
    instance = SimpleNamespace(args=(context, continuation))
    return GPTAdapter(make_model(), make_encoding(), bf16=False).loglikelihood([instance], disable_tqdm=True)[0][0]


def read_items(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (OURS / f"{name}.jsonl").read_text().splitlines()]


# The demo suite


def test_the_demo_scores_every_kind(demo: Suite, adapter: GPTAdapter) -> None:
    result = run_suite(adapter, demo)
    kinds = {"demo_perplexity": "bits_per_byte,none"} | dict.fromkeys(
        ("demo_choice", "demo_boolean", "demo_physical"), "acc,none"
    )
    assert result["results"].keys() == kinds.keys()
    for task, metric in kinds.items():
        assert math.isfinite(result["results"][task][metric])
        assert result["n-samples"][task]["effective"] >= 16
    assert result["random_guess"] == {"demo_choice": 0.25, "demo_boolean": 0.5, "demo_physical": 0.5}
    assert 0 < result["results"]["demo_choice"]["acc_stderr,none"] < 0.1
    json.dumps(result, allow_nan=False)


def test_an_accuracy_is_what_the_models_own_likelihoods_say(demo: Suite, adapter: GPTAdapter) -> None:
    correct = []
    for item in read_items("demo_physical"):
        context = f"Question: {item['goal']}\nAnswer:"
        first, second = (loglikelihood(context, f" {item[solution]}") for solution in ("sol1", "sol2"))
        correct.append((second > first) == item["label"])
    assert run_suite(adapter, demo)["results"]["demo_physical"]["acc,none"] == pytest.approx(np.mean(correct))


def test_perplexity_is_of_the_beginnings_of_held_out_documents_of_every_domain(demo: Suite) -> None:
    documents = [json.loads(line) for line in (demo.folder / "demo_perplexity.jsonl").read_text().splitlines()]
    assert {document["domain"] for document in documents} == {"prose", "code"}
    for document in documents:
        assert "<|endoftext|>" not in document["text"]
        assert document["text"].startswith(tuple(TEXT))


def test_a_limit_scores_the_first_items_only(demo: Suite, adapter: GPTAdapter) -> None:
    result = run_suite(adapter, demo, limit=5)
    assert {counts["effective"] for counts in result["n-samples"].values()} == {5}
    assert result["config"]["limit"] == 5


@pytest.mark.parametrize("name", ["demo_choice", "demo_boolean", "demo_physical"])
def test_our_items_are_all_different_and_no_place_is_favoured(name: str) -> None:
    items = read_items(name)
    assert len({json.dumps(item) for item in items}) == len(items)
    if name == "demo_choice":
        places = [item["choices"]["label"].index(item["answerKey"]) for item in items]
        assert all(len(set(item["choices"]["text"])) == 4 for item in items)
    else:
        places = [item["label"] for item in items]
    counts = np.bincount(places)
    assert counts.min() == counts.max()


# The full suite


def test_all_eleven_tasks_run_under_their_own_names(full_result: dict[str, Any]) -> None:
    members = {"mmlu_anatomy", "mmlu_world_religions"}
    assert full_result["results"].keys() == ELEVEN | members
    assert full_result["data"]["tasks"].keys() == ELEVEN
    assert set(full_result["n-shot"].values()) == {0}
    for task in ELEVEN - {"mmlu"}:
        split = "validation" if f"{task}/validation" in ITEMS and f"{task}/test" not in ITEMS else "test"
        assert full_result["n-samples"][task]["effective"] == len(ITEMS[f"{task}/{split}"])
        assert full_result["data"]["tasks"][task]["split"] == split
    json.dumps(full_result, allow_nan=False)


def test_sciq_says_that_it_is_the_validation_split(full_result: dict[str, Any]) -> None:
    assert full_result["data"]["tasks"]["sciq"]["note"] == "validation split; the task's own is test"
    assert "sciq (validation split)" in set(score_table(full_result)["task"])
    # The others' own split is what they are scored on, validation or not.
    assert [task for task, facts in full_result["data"]["tasks"].items() if "note" in facts] == ["sciq"]


def test_prompts_are_lm_evals_own(full_result: dict[str, Any]) -> None:
    answer = " carbon dioxide"
    items = ITEMS["sciq/validation"]
    contexts = [f"{item['support']}\nQuestion: {item['question']}\nAnswer:" for item in items]
    bits = -sum(loglikelihood(context, answer) for context in contexts) / math.log(2)
    sciq = full_result["answers"]["sciq"]
    assert sciq["bits_per_byte"] == pytest.approx(bits / (len(items) * len(answer)), rel=1e-5)


def test_winogrande_scores_the_ending_after_the_right_beginning(full_result: dict[str, Any]) -> None:
    pairs = [
        ("The cup broke the tray as the cup", " was heavy."),
        ("Ann paid Eve because Eve", " had worked."),
        ("Ann thanked Eve because Eve", " had helped."),
    ]
    bits = -sum(loglikelihood(*pair) for pair in pairs) / math.log(2)
    characters = sum(len(ending) for _, ending in pairs)
    assert full_result["answers"]["winogrande"]["bits_per_byte"] == pytest.approx(bits / characters, rel=1e-5)


def test_mmlu_is_the_mean_over_items_and_its_subjects_are_not_listed(full_result: dict[str, Any]) -> None:
    results, counts = full_result["results"], full_result["n-samples"]
    members = ("mmlu_anatomy", "mmlu_world_religions")
    correct = sum(results[member]["acc,none"] * counts[member]["effective"] for member in members)
    assert counts["mmlu"]["effective"] == 4
    assert results["mmlu"]["acc,none"] == pytest.approx(correct / 4)
    assert not any("anatomy" in task for task in score_table(full_result)["task"])


def test_items_longer_than_the_context_are_counted(full_result: dict[str, Any]) -> None:
    truncated = {task: count for task, count in full_result["truncated"].items() if count}
    assert truncated == {"lambada_openai": 1, "boolq": 1}


def test_baselines_of_guessing(full_result: dict[str, Any]) -> None:
    guess = full_result["random_guess"]
    assert guess["arc_easy"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert guess["winogrande"] == 0.5
    assert "lambada_openai" not in guess
    constant = full_result["constant_guess"]
    assert constant["boolq"] == pytest.approx(2 / 3)
    assert constant["mmlu"] == 0.5
    # The correct answer always stands last there, where no model sees it.
    assert constant["sciq"] is None


def test_the_same_files_have_the_same_hash_and_others_another(full: Suite, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    items = write_items(tmp_path / "items")
    assert full_suite_from_files(tmp_path / "again", items).data == full.data
    (items / "mmlu/test/anatomy.jsonl").write_text(json.dumps(ITEMS["mmlu/test/anatomy"][0]) + "\n")
    (tmp_path / "changed").mkdir()
    changed = full_suite_from_files(tmp_path / "changed", items).data
    assert [task for task in ELEVEN if changed[task] != full.data[task]] == ["mmlu"]


def test_a_missing_task_is_named_and_nothing_is_scored(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items")
    (items / "piqa/validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"piqa/validation\.jsonl: no such file"):
        full_suite_from_files(tmp_path, items)


def test_an_unknown_subject_of_mmlu_is_named(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items")
    (items / "mmlu/test/juggling.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="'juggling' is no subject of MMLU"):
        full_suite_from_files(tmp_path, items)


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path, adapter: GPTAdapter) -> None:
    items = write_items(tmp_path / "items")
    (items / "openbookqa/test.jsonl").write_text('{"id": "8-3", "question')
    with pytest.raises(UserError, match="task openbookqa: its items cannot be read as JSON lines"):
        run_suite(adapter, full_suite_from_files(tmp_path, items))


def test_without_the_hub_the_error_says_what_helps(
    tmp_path: Path, adapter: GPTAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(evaluation.datasets.config, "HF_HUB_OFFLINE", True)
    suite = full_suite_from_hub(tmp_path)
    assert set(suite.names) == ELEVEN
    with pytest.raises(UserError, match=r"wikitext.*Hugging Face hub.*a folder of evaluation data"):
        run_suite(adapter, suite)


# What is said beside lm-eval's scores


def test_bits_of_the_correct_answers() -> None:
    def sample(target: int, *loglikelihoods: float) -> dict[str, Any]:
        arguments = [("q", f" {'é' * (index + 1)}") for index in range(len(loglikelihoods))]
        return {
            "target": target,
            "arguments": arguments,
            "filtered_resps": [(value, False) for value in loglikelihoods],
        }

    found = answers.correct_answers([sample(0, -3 * math.log(2), 0), sample(1, 0, -5 * math.log(2))])
    assert found["n"] == 2
    assert found["bits_per_byte"] == pytest.approx((3 + 5) / (3 + 5))
    assert found["bits_per_character"] == pytest.approx((3 + 5) / (2 + 3))
    # Both items cost one bit a byte, so nothing is uncertain about that; by characters they differ.
    assert found["bits_per_byte_stderr"] == pytest.approx(0)
    assert found["bits_per_character_stderr"] > 0
