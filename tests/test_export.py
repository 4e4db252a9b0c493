"""The exported model is the model: transformers' Qwen3 and lm-eval's own adapter agree with ours."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fp8lab import export, tokenizer
from fp8lab.errors import UserError
from fp8lab.evaluation import run_suite, score_table
from fp8lab.evaluation.adapter import GPTAdapter
from fp8lab.evaluation.suites import Suite, full_suite_from_files
from fp8lab.model import GPT
from fp8lab.tokenizer import END_OF_TEXT
from tests.evaluation_items import write_items
from tests.small_gpt import TEXT, make_encoding, make_model


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return make_encoding()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


@pytest.fixture(scope="module")
def folder(model: GPT, encoding: tiktoken.Encoding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export.write(model, encoding, folder)
    return folder


def test_transformers_gives_the_same_logits(model: GPT, folder: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(exported).__name__ == "Qwen3ForCausalLM"
    tokens = torch.randint(0, 368, (3, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), exported(tokens).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_the_folder_holds_weights_and_text_only(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert "auto_map" not in (folder / "config.json").read_text()


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*TEXT, "<|endoftext|>", " ", "\n", "''s"])).map("".join)))
def test_the_tokenizers_agree(encoding: tiktoken.Encoding, fast, text: str) -> None:
    tokens = encoding.encode_ordinary(text)
    assert fast.encode(text) == tokens
    assert fast.decode(tokens) == encoding.decode(tokens)


@pytest.fixture(scope="module")
def fast(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_gpt2s_own_tokenizer_agrees() -> None:
    encoding = tokenizer.gpt2()
    fast = export.fast_tokenizer(encoding, 1024)
    text = "".join(TEXT) * 3 + " antidisestablishmentarianism<|endoftext|>\n\n\n  x"
    assert fast.encode(text) == encoding.encode_ordinary(text)
    assert fast.eos_token_id == encoding.eot_token == 50_256


def test_a_piece_that_is_a_token_is_taken_whole_though_no_merges_lead_there() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"cd": 258, b"abcd": 259}
    stock = tokenizer.gpt2()
    encoding = tiktoken.Encoding(
        "odd", pat_str=stock._pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 260}
    )
    fast = export.fast_tokenizer(encoding, 16)
    for text, tokens in {"abcd": [259], "abcde": [97, 256, 100, 101]}.items():
        assert fast.encode(text) == encoding.encode_ordinary(text) == tokens


def test_lm_evals_own_adapter_gives_the_same_scores(model, encoding, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    suite = full_suite_from_files(tmp_path / "tasks", write_items(tmp_path / "items"))
    assert_same_scores(suite, GPTAdapter(model, encoding, bf16=False), folder)


def assert_same_scores(suite: Suite, adapter: GPTAdapter, folder: Path) -> None:
    """`adapter` and ``lm_eval --model hf`` on the exported `folder` agree on every item of `suite`."""
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    asked = {}
    results = {}
    for name, lm in {"ours": adapter, "theirs": theirs}.items():
        asked[name] = record_answers(lm)
        results[name] = run_suite(lm, suite)
    assert len(asked["ours"]) >= 50
    torch.testing.assert_close(torch.tensor(asked["ours"]), torch.tensor(asked["theirs"]), atol=1e-3, rtol=1e-5)
    ours, theirs = (score_table(results[name]) for name in ("ours", "theirs"))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)


def record_answers(lm) -> list[tuple[float, float]]:
    """The list into which every log-likelihood that `lm` gives from now on goes, and whether it was the likeliest."""
    answers: list[tuple[float, float]] = []

    def recording(kind: str):
        answer = getattr(lm, kind)

        def wrapped(requests, **options):
            given = answer(requests, **options)
            answers.extend(entry if isinstance(entry, tuple) else (entry, 0.0) for entry in given)
            return given

        return wrapped

    for kind in ("loglikelihood", "loglikelihood_rolling"):
        setattr(lm, kind, recording(kind))
    return answers


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        export.export(tmp_path / "run", tmp_path, data_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
