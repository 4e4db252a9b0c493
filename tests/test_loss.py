"""Training's loss and validation's are the same function of the weights."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lab import loss
from fp8lab.loss import total_nats, training_loss
from fp8lab.model import GPT
from tests.rule_data import VOCAB_SIZE, tiny_model


def some_hidden(seed: int) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = GPT(tiny_model())
    model.initialise(seed)
    targets = torch.randint(0, VOCAB_SIZE, (2, 12), generator=generator)
    return model, torch.randn(2, 12, 32, generator=generator).bfloat16(), targets


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_training_and_validation_agree(seed) -> None:
    model, hidden, targets = some_hidden(seed)
    objective, cross_entropy = training_loss(model, hidden.requires_grad_(), targets)
    assert objective.item() == cross_entropy.item()
    assert abs(total_nats(model, hidden, targets).item() / 24 - cross_entropy.item()) < 1e-4


def test_z_loss_is_in_the_objective_alone() -> None:
    model, hidden, targets = some_hidden(0)
    plain, _ = training_loss(model, hidden.requires_grad_(), targets)
    objective, cross_entropy = training_loss(model, hidden, targets, z_loss=0.1)
    assert cross_entropy.item() == plain.item()
    log_z = model.logits(hidden).float().logsumexp(-1)
    assert abs(objective.item() - plain.item() - 0.1 * log_z.square().mean().item()) < 1e-2


def test_validation_never_holds_the_logits_of_the_whole_batch(monkeypatch) -> None:
    model, hidden, targets = some_hidden(0)
    largest: list[int] = []
    model.head.register_forward_hook(lambda *arguments: largest.append(arguments[2].numel()))
    whole = total_nats(model, hidden, targets).item()
    monkeypatch.setattr(loss, "CPU_CHUNK_LOGITS", 5 * VOCAB_SIZE)
    assert abs(total_nats(model, hidden, targets).item() - whole) < 1e-4
    assert largest == [24 * VOCAB_SIZE] + [5 * VOCAB_SIZE] * 4 + [4 * VOCAB_SIZE]
