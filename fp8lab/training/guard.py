"""Deciding on the device whether a step is taken.

A step whose loss or gradient is not finite would destroy the weights, so it is skipped; optionally
also one whose loss or gradient norm is an outlier against recent steps (the step-skipping optimizer
of OLMo-core). The verdict stays on the device, where the fused optimizer reads it as `found_inf`: the
host learns of it when metrics are flushed, and never waits. It judges with few operations: where a step
takes a GPU less time than the host needs to queue it, each one costs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

OUTLIER_WINDOW = 128
"""Steps that an outlier is judged against; none is judged before the window is full."""


class StepGuard(nn.Module):
    """Judges every step; its buffers are part of a resumable checkpoint."""

    losses: Tensor
    norms: Tensor
    taken: Tensor
    skipped: Tensor
    skipped_in_a_row: Tensor
    first_bad_step: Tensor
    first_bad_parameters: Tensor
    streak_bad_parameters: Tensor

    def __init__(self, parameters: int, outlier_deviations: float | None) -> None:
        """
        Args:
            parameters: number of parameter tensors.
            outlier_deviations: skip a step this many standard deviations above the mean; None: never.
        """
        super().__init__()
        self._outlier_deviations = outlier_deviations
        self.register_buffer("losses", torch.zeros(OUTLIER_WINDOW))
        self.register_buffer("norms", torch.zeros(OUTLIER_WINDOW))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_in_a_row", torch.zeros((), dtype=torch.int64))
        # Whose gradients were not finite, in the run's first step that was not, and in the first of the last steps
        # that were skipped in a row.
        self.register_buffer("first_bad_step", torch.full((), -1, dtype=torch.int64))
        self.register_buffer("first_bad_parameters", torch.zeros(parameters, dtype=torch.bool))
        self.register_buffer("streak_bad_parameters", torch.zeros(parameters, dtype=torch.bool))

    @torch.no_grad()
    def judge(self, step: int, loss: Tensor, parameter_norms: Tensor) -> tuple[Tensor, Tensor]:
        """The verdict on one step.

        Args:
            step: the step's number, kept if it is the first bad one.
            loss: scalar.
            parameter_norms: (parameters,) L2 norm of each parameter's gradient.

        Returns:
            The global gradient norm, and whether to skip the step: a scalar, and a boolean scalar.
        """
        norm = torch.linalg.vector_norm(parameter_norms)
        bad = _not_finite(loss) | _not_finite(norm)
        bad_parameters = _not_finite(parameter_norms)
        is_first = bad & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(is_first, step)
        torch.where(is_first, bad_parameters, self.first_bad_parameters, out=self.first_bad_parameters)
        skip = bad
        limit = self._outlier_deviations
        if limit is not None:
            skip = bad | self._exceeds(self.losses, loss, limit) | self._exceeds(self.norms, norm, limit)
            self._remember(loss, norm, skip)
        # The first of several skipped in a row is the one that tells: the others meet the same weights.
        is_later = self.skipped_in_a_row > 0
        torch.where(is_later, self.streak_bad_parameters, bad_parameters, out=self.streak_bad_parameters)
        self.taken += ~skip
        self.skipped += skip
        self.skipped_in_a_row.add_(1).mul_(skip)
        return norm, skip

    @torch.no_grad()
    def forget_skipped(self) -> None:
        """Count skipped and non-finite steps from now on; what outliers are judged against stays."""
        for buffer in (self.skipped, self.skipped_in_a_row, self.first_bad_parameters, self.streak_bad_parameters):
            buffer.zero_()
        self.first_bad_step.fill_(-1)

    def _remember(self, loss: Tensor, norm: Tensor, skip: Tensor) -> None:
        # A skipped step leaves the history alone, or one outlier would excuse the next.
        slot = (torch.arange(OUTLIER_WINDOW, device=loss.device) == self.taken % OUTLIER_WINDOW) & ~skip
        self.losses.copy_(torch.where(slot, loss, self.losses))
        self.norms.copy_(torch.where(slot, norm, self.norms))

    def _exceeds(self, history: Tensor, value: Tensor, limit: float) -> Tensor:
        deviation = (value - history.mean()) / history.std().clamp(min=1e-12)
        return (self.taken >= OUTLIER_WINDOW) & (deviation > limit)


def _not_finite(values: Tensor) -> Tensor:
    # Infinities and NaN less themselves are NaN: two launches, where torch.isfinite takes four.
    return values - values != 0
