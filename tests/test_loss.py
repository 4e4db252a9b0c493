"""The chunked loss is the plain loss, value and gradients, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab import loss
from fp8lab.loss import next_token_loss
from fp8lab.model import GPT
from tests.rule_data import VOCAB_SIZE, tiny_model


def reference(model, hidden, targets, z_loss):
    logits = model.logits(hidden).float()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return cross_entropy + z_loss * logits.logsumexp(-1).square().mean(), cross_entropy


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), z_loss=st.sampled_from([0.0, 1e-2]), seed=st.integers(0, 99))
def test_value_and_gradients_match_the_unchunked_loss(rows, z_loss, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = GPT(tiny_model())
    model.initialise(seed)
    targets = torch.randint(0, VOCAB_SIZE, (2, 12), generator=generator)
    hidden = torch.randn(2, 12, 32, generator=generator)
    results = []
    for function in (reference, next_token_loss):
        model.zero_grad()
        leaf = hidden.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "CHUNK_LOGITS", rows * VOCAB_SIZE)
            objective, cross_entropy = function(model, leaf, targets, z_loss)
        (3 * objective).backward()
        results.append((objective, cross_entropy, leaf.grad, model.embedding.weight.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_validation_takes_no_gradient() -> None:
    model = GPT(tiny_model())
    with torch.no_grad():
        objective, _ = next_token_loss(model, torch.randn(1, 4, 32), torch.zeros(1, 4, dtype=torch.int64))
    assert not objective.requires_grad


def test_logits_of_the_whole_batch_are_never_held(monkeypatch) -> None:
    model = GPT(tiny_model())
    largest = []
    model.head.register_forward_hook(lambda *arguments: largest.append(arguments[2].numel()))
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 5 * VOCAB_SIZE)
    next_token_loss(model, torch.randn(4, 16, 32), torch.zeros(4, 16, dtype=torch.int64))[0].backward()
    assert max(largest) <= 5 * VOCAB_SIZE
    assert sum(largest) == 64 * VOCAB_SIZE
