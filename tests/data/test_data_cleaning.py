from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab.data import cleaning, sources
from fp8lab.errors import UserError
from tests.data.conftest import sentence


def exclusions(*parts: list[str | None]) -> list[cleaning.Exclusions]:
    return cleaning.find_exclusions([cleaning.fingerprints(part) for part in parts])


def test_a_repeated_document_goes_and_the_first_stays() -> None:
    a, b = sentence("a"), sentence("b")
    first, second = exclusions([a, b, a], [b, sentence("c")])
    assert (first.exact_duplicate, second.exact_duplicate) == ({2}, {0})
    assert not first.near_duplicate
    assert not second.near_duplicate


def test_a_document_with_a_few_words_changed_is_a_near_duplicate() -> None:
    original = sentence("a", words=400)
    words = original.split()
    words[100] = "changed"
    words[300] = "changed"
    (found,) = exclusions([original, " ".join(words), sentence("b", words=400)])
    assert found.near_duplicate == {1}


def test_a_document_that_shares_half_its_text_is_kept() -> None:
    half = sentence("a", words=300)
    (found,) = exclusions([half + sentence("b", words=300), half + sentence("c", words=300)])
    assert not found.near_duplicate


def test_layout_and_case_do_not_hide_a_near_duplicate() -> None:
    original = sentence("a", words=100)
    (found,) = exclusions([original, "  " + original.upper().replace(" ", "\n")])
    assert found.near_duplicate == {1}


def test_unreadable_documents_keep_their_numbers() -> None:
    prints = cleaning.fingerprints([None, "some words", " \n", "other words"])
    assert prints.numbers.tolist() == [1, 3]
    assert (prints.documents, prints.unreadable) == (4, 1)


@pytest.fixture
def items(tmp_path: Path) -> cleaning.EvaluationItems:
    (tmp_path / "task").mkdir()
    rows = [
        {"question": "What " + sentence("q", words=20), "choices": ["first", sentence("choice", words=16)], "label": 1},
        {"text": "too short to match"},
    ]
    (tmp_path / "task" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cleaning.EvaluationItems.read(tmp_path)


def test_thirteen_words_of_an_item_contaminate_and_twelve_do_not(items: cleaning.EvaluationItems) -> None:
    item = sentence("q", words=20).split()
    around = sentence("around").split()
    assert items.contaminate(" ".join(around + item[3:16] + around))
    assert not items.contaminate(" ".join(around + item[3:15] + around))


def test_contamination_is_found_where_a_long_document_is_cut(
    items: cleaning.EvaluationItems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 300)
    item, around = sentence("q", words=20).split(), sentence("around", words=200).split()
    for words in range(60):  # the cut, at a line end, falls before, inside and behind the shared words
        assert items.contaminate("\n".join([*around[:words], *item[3:16], *around]))
        assert not items.contaminate("\n".join([*around[:words], *item[3:15], *around]))


def test_a_long_document_has_the_same_fingerprint_cut_or_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = sentence("long", words=2000)
    whole = cleaning.fingerprints([text])
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 1000)
    cut = "\n".join(text.split())  # pieces end at line ends, so between words
    np.testing.assert_array_equal(cleaning.fingerprints([cut]).signatures, whole.signatures)


def test_punctuation_case_and_nesting_do_not_hide_contamination(items: cleaning.EvaluationItems) -> None:
    choice = sentence("choice", words=16).upper().replace(" ", ", (")
    assert items.contaminate("Before. " + choice)


def test_short_items_and_short_documents_contaminate_nothing(items: cleaning.EvaluationItems) -> None:
    assert not items.contaminate("too short to match")
    assert not items.contaminate("")
    assert items.report.items == 2


def test_no_evaluation_data_is_refused_by_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation data there"):
        cleaning.EvaluationItems.read(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(UserError, match=r"broken\.jsonl: line 2 is not JSON"):
        cleaning.EvaluationItems.read(tmp_path)


@given(st.lists(st.sampled_from("abcdef"), max_size=40), st.integers(1, 13))
@settings(deadline=None)
def test_ngram_hashes_agree_exactly_where_the_ngrams_do(words: list[str], n: int) -> None:
    hashes = cleaning.ngram_hashes(next(cleaning.word_hashes(" ".join(words)), np.empty(0, dtype=np.uint64)), n)
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(ngrams)
    assert len(np.unique(hashes)) == len(set(ngrams))
    assert len(set(zip(hashes.tolist(), ngrams, strict=True))) == len(set(ngrams))


def test_the_validation_split_is_by_content_and_of_the_size_asked_for() -> None:
    texts = [sentence(str(n), words=8) for n in range(4000)]
    held_out = [cleaning.in_validation(text, 0.1) for text in texts]
    assert held_out == [cleaning.in_validation(text, 0.1) for text in texts]
    assert 340 < sum(held_out) < 460
