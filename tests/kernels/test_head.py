"""The head's loss and gradients are those of the plain computation; in FP8 they stay close."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8lab import loss
from fp8lab.kernels import Fp8TiedHead, head, linear_cross_entropy
from fp8lab.kernels.operations import operations
from fp8lab.model import GPT
from tests.rule_data import tiny_model

TOKENS, D_MODEL, VOCABULARY = 160, 48, 304


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, D_MODEL, generator=generator).bfloat16()
    weight = torch.randn(VOCABULARY, D_MODEL, generator=generator) * 0.2
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.bfloat16().t()).float()
    entropy = F.cross_entropy(logits, targets)
    return entropy + z_loss * logits.logsumexp(-1).square().mean(), entropy


@pytest.mark.parametrize("chunk_logits", [2**30, 40_000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("fp8", [False, True])
def test_loss_and_gradients(monkeypatch, device, fp8, z_loss, chunk_logits) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(head, "EMULATED_CHUNK_LOGITS", chunk_logits)
    expected_inputs, actual_inputs = inputs(device), inputs(device)
    expected = plain(*expected_inputs, z_loss)
    actual = linear_cross_entropy(*actual_inputs, fp8=fp8, z_loss=z_loss)
    tolerance = 0.02 if fp8 else 1e-4
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=0)
    (3 * expected[0]).backward()
    (3 * actual[0]).backward()
    for got, wanted in zip(actual_inputs[:2], expected_inputs[:2], strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        error = (got.grad - wanted.grad).norm() / wanted.grad.norm()
        assert error < (0.12 if fp8 else 0.01)
        assert got.grad.dtype == wanted.grad.dtype


def test_nan_reaches_the_loss(device) -> None:
    for fp8 in (False, True):
        hidden, weight, targets = inputs(device)
        with torch.no_grad():
            hidden[5, 3] = torch.nan
        assert linear_cross_entropy(hidden, weight, targets, fp8=fp8)[0].isnan()


def test_fp8_logits(device) -> None:
    hidden, weight, _ = inputs(device)
    logits = Fp8TiedHead(emulate=device.type == "cpu")(hidden.view(2, -1, D_MODEL), weight)
    wanted = hidden.view(2, -1, D_MODEL) @ weight.bfloat16().t()
    assert logits.shape == wanted.shape
    assert 0 < (logits - wanted).norm() / wanted.norm() < 0.06


def test_validation_by_the_kernel_is_plain_cross_entropy_and_makes_no_fp32_logits(monkeypatch, device) -> None:
    model = GPT(tiny_model()).to(device)
    model.initialise(1)
    vocabulary = len(model.embedding.weight)
    hidden = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    targets = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(2)).to(device)
    wanted = F.cross_entropy(model.logits(hidden).float().flatten(0, 1), targets.flatten(), reduction="sum")
    seen: list[tuple[torch.dtype, int]] = []
    triton_ops = operations(emulate=False)
    kernel = triton_ops.cross_entropy_alone
    monkeypatch.setattr(
        triton_ops, "cross_entropy_alone", lambda x, *rest: seen.append((x.dtype, len(x))) or kernel(x, *rest)
    )
    # As on a GPU.
    monkeypatch.setattr(loss, "operations", lambda emulate: triton_ops)
    monkeypatch.setattr(loss, "CPU_CHUNK_LOGITS", 10 * vocabulary)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 10 * vocabulary)
    found = loss.total_nats(model, hidden, targets)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert seen == [(torch.bfloat16, 10), (torch.bfloat16, 10), (torch.bfloat16, 4)]
