"""Sampling: seeded, inside the vocabulary, and nothing in a prompt is special."""

from __future__ import annotations

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab.generation import generate
from fp8lab.model import GPT
from tests.rule_data import VOCAB_SIZE, RuleDataset, tiny_model


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(tiny_model())
    model.initialise(seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return RuleDataset().encoding


@settings(max_examples=15, deadline=None)
@given(prompt=st.text(max_size=60), temperature=st.floats(0, 3), top_k=st.integers(0, 300), seed=st.integers(0, 9))
def test_the_same_request_writes_the_same_text(model, encoding, prompt, temperature, top_k, seed) -> None:
    texts = [generate(model, encoding, prompt, 5, temperature, top_k, seed) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) <= 5


def test_the_likeliest_token_is_what_temperature_0_and_top_1_take(model, encoding) -> None:
    greedy = generate(model, encoding, "abc", 8, temperature=0)
    assert greedy == generate(model, encoding, "abc", 8, temperature=2.0, top_k=1, seed=7)
    assert greedy != generate(model, encoding, "abc", 8, temperature=2.0, top_k=0, seed=7)


def test_padding_rows_of_the_embedding_are_never_written(model, encoding) -> None:
    model = GPT(tiny_model())
    model.initialise(seed=1)
    with torch.no_grad():
        model.embedding.weight[encoding.n_vocab :] *= 1e3
    generate(model, encoding, "abc", 20, temperature=1.0, top_k=0)


def test_an_end_of_text_token_ends_the_text(encoding) -> None:
    model = GPT(tiny_model())
    model.initialise(seed=1)
    model.head.register_forward_hook(lambda *_: torch.eye(VOCAB_SIZE)[[encoding.eot_token]])
    assert generate(model, encoding, "abc", 20, temperature=0) == ""


def test_a_special_token_in_a_prompt_is_plain_text(model, encoding) -> None:
    seen = []
    hidden = model.hidden
    model.hidden = lambda tokens: seen.append(tokens) or hidden(tokens)
    try:
        generate(model, encoding, "<|endoftext|>", 1)
    finally:
        del model.hidden
    # The one that begins the document is ours; the prompt's characters are bytes.
    assert (seen[0] == encoding.eot_token).sum() == 1
    assert seen[0].shape[1] == 1 + len("<|endoftext|>")
