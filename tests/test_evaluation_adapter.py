"""Log-likelihoods as lm-eval gets them, against the model's own logits, one sequence at a time."""

from __future__ import annotations

import random

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from fp8lab.evaluation.adapter import GPTAdapter
from fp8lab.model import GPT
from tests.small_gpt import CONFIG, TEXT, make_encoding, make_model

CONTEXT = CONFIG.seq_len
PAIRS = [
    ("The largest value of each row", " is its scale"),
    ("The largest value of each row", " is"),
    ("def softmax(x):", "\n    return np.exp(x)"),
    ("", "The largest value"),
    ("naïve café", ", 100 €, 東京"),
    ("what ends a text:", " <|endoftext|> written out"),
    *[("The answer is", f" {letter}") for letter in "ABCD"],
]


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return make_encoding()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


@pytest.fixture
def adapter(model: GPT, encoding: tiktoken.Encoding) -> GPTAdapter:
    return GPTAdapter(model, encoding, bf16=False)


def requests(arguments: list[tuple], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=index) for index, pair in enumerate(arguments)]


@torch.no_grad()
def direct(model: GPT, inputs: list[int], targets: list[int]) -> tuple[float, bool]:
    """Score of `targets`, the tokens after the last of the inputs' positions, and whether each is the likeliest."""
    logits = model(torch.tensor([inputs]))[0, -len(targets) :].double()
    chosen = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return float(chosen.sum()), logits.argmax(-1).tolist() == targets


def scored_alone(model: GPT, encoding: tiktoken.Encoding, context: str, continuation: str) -> float:
    before = encoding.encode_ordinary(context) or [encoding.eot_token]
    after = encoding.encode_ordinary(context + continuation)[len(before) if context else 0 :]
    return direct(model, (before + after)[:-1], after)[0]


def long_text(encoding: tiktoken.Encoding, tokens: int) -> str:
    """Text of at least so many tokens."""
    rng = random.Random(5)
    text = ""
    while len(encoding.encode_ordinary(text)) < tokens:
        text += rng.choice(TEXT)
    return text


def test_loglikelihoods_are_the_models(adapter: GPTAdapter, model: GPT, encoding: tiktoken.Encoding) -> None:
    found = [score for score, _ in adapter.loglikelihood(requests(PAIRS), disable_tqdm=True)]
    assert found == pytest.approx([scored_alone(model, encoding, *pair) for pair in PAIRS], abs=1e-4)
    assert adapter.truncated == set()


def test_the_likeliest_continuation_is_known_as_such(adapter: GPTAdapter, model: GPT) -> None:
    tokens = [5, 77, 200]
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % CONFIG.vocab_size]
    asked = [(("", ""), tokens[:3], tokens[3:]), (("", ""), tokens[:3], other[3:])]
    assert [greedy for _, greedy in adapter._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False]


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(PAIRS))), batch_tokens=st.sampled_from([1, 48, 100, 100_000]))
def test_neither_order_nor_batches_change_a_score(model, encoding, order, batch_tokens) -> None:
    adapter = GPTAdapter(model, encoding, bf16=False, batch_tokens=batch_tokens)
    found = adapter.loglikelihood(requests([PAIRS[index] for index in order]), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx(
        [scored_alone(model, encoding, *PAIRS[index]) for index in order], abs=1e-4
    )


def test_a_slice_of_the_head_at_a_time_gives_the_same(adapter, model, encoding, monkeypatch) -> None:
    monkeypatch.setattr("fp8lab.evaluation.adapter.HEAD_ELEMENTS", 3 * CONFIG.vocab_size)
    found = [score for score, _ in adapter.loglikelihood(requests(PAIRS), disable_tqdm=True)]
    assert found == pytest.approx([scored_alone(model, encoding, *pair) for pair in PAIRS], abs=1e-4)


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 17])
def test_a_long_text_is_scored_once_per_token(adapter, model, encoding, length: int) -> None:
    text = encoding.decode(encoding.encode_ordinary(long_text(encoding, 4 * CONTEXT))[:length])
    tokens = encoding.encode_ordinary(text)
    assert len(tokens) == length
    shifted = [encoding.eot_token, *tokens]
    expected = 0.0
    for start in range(0, length, CONTEXT):
        end = min(start + CONTEXT, length)
        # The last window reaches back, so that its tokens too have all the context they can.
        expected += direct(model, shifted[max(0, end - CONTEXT) : end], tokens[start:end])[0]
    asked = requests([(text,), ("",), (text,)], "loglikelihood_rolling")
    assert adapter.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx([expected, 0, expected], rel=1e-5)
    assert adapter.truncated == set()


def test_an_item_longer_than_the_context_loses_its_left_end_and_is_counted(adapter, model, encoding) -> None:
    text = long_text(encoding, 3 * CONTEXT).rstrip()
    continuation = " is its scale"
    scored = encoding.encode_ordinary(text + continuation)
    count = len(scored) - len(encoding.encode_ordinary(text))
    pairs = [(text, continuation), ("The largest value", continuation)]
    found = adapter.loglikelihood(requests(pairs), disable_tqdm=True)
    window = scored[-(CONTEXT + 1) :]
    assert found[0][0] == pytest.approx(direct(model, window[:-1], window[-count:])[0], abs=1e-4)
    assert adapter.truncated == {(text, continuation)}


def test_an_item_that_just_fits_is_not_truncated(adapter: GPTAdapter, model: GPT) -> None:
    tokens = torch.randint(0, 352, (CONTEXT + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    [(score, _)] = adapter._loglikelihood_tokens([(("c", "d"), tokens[:-3], tokens[-3:])], disable_tqdm=True)
    assert score == pytest.approx(direct(model, tokens[:-1], tokens[-3:])[0], abs=1e-4)
    assert adapter.truncated == set()


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(adapter, encoding) -> None:
    (at_end, _), (at_start, _) = adapter.loglikelihood(
        requests([("The largest ", "value"), ("The largest", " value")]), disable_tqdm=True
    )
    assert at_end == at_start


def test_a_continuation_that_melts_into_its_context_is_refused(adapter: GPTAdapter) -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        adapter.loglikelihood(requests([("The largest", "")]), disable_tqdm=True)


def test_bf16_is_near_fp32(model: GPT, encoding: tiktoken.Encoding) -> None:
    found = GPTAdapter(model, encoding).loglikelihood(requests(PAIRS), disable_tqdm=True)
    expected = [scored_alone(model, encoding, *pair) for pair in PAIRS]
    assert [score for score, _ in found] == pytest.approx(expected, rel=0.03)
    assert [score for score, _ in found] != pytest.approx(expected, rel=1e-6)


def test_progress_counts_requests_to_the_end(model: GPT, encoding: tiktoken.Encoding) -> None:
    seen = []
    adapter = GPTAdapter(model, encoding, batch_tokens=32, on_progress=seen.append)
    adapter.loglikelihood(requests(PAIRS), disable_tqdm=True)
    steps = [progress.step for progress in seen]
    assert steps == sorted(steps)
    assert steps[-1] == seen[-1].steps == len(PAIRS)
    assert seen[-1].stage == "evaluating"


def test_generative_tasks_are_referred_to_the_export(adapter: GPTAdapter) -> None:
    with pytest.raises(NotImplementedError, match="fp8lab export"):
        adapter.generate_until(requests([("a", {})], "generate_until"))
