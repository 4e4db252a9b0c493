"""Where a run's numbers stopped being finite: the step, and the layer.

The guard (`fp8lab.training.guard`) skips steps that would destroy the weights and notes, on the device, which
parameters' gradients were not finite. A run that skips step after step has diverged. What is said here is read when
the record is written and when steps are skipped, and never in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.data import Loader
from fp8lab.model import GPT
from fp8lab.training.session import Session

DIVERGED_AFTER = 20
"""Skipped steps in a row after which a run has diverged."""


class Diverged(Exception):
    """Every one of the last steps was skipped, or the final weights have no finite validation loss."""


class Divergence:
    """What was not finite in a session's steps, and where it arose."""

    def __init__(self, session: Session, loader: Loader) -> None:
        self._session = session
        self._loader = loader
        self._bad_output: str | None = None

    def has_come(self) -> bool:
        """True if so many steps in a row were skipped that no more are worth taking; waits for the device."""
        return int(self._session.guard.skipped_in_a_row) >= DIVERGED_AFTER

    def reason(self) -> str:
        """Why the run has diverged, and where it began; all ranks ask together."""
        session = self._session
        # No step was taken since these were first skipped: what fails now failed then.
        rows = torch.from_numpy(self._loader.batch(session.step - 1)[: session.config.micro_batch])
        self._bad_output = first_non_finite_output(session.model, lambda: session.forward(rows))
        count, is_bad = int(session.guard.skipped_in_a_row), session.guard.streak_bad_parameters.tolist()
        began = session.step - count + 1
        reason = f"{count} steps in a row were skipped, the first of them step {began}"
        if any(is_bad):
            reason += f": its loss or gradient was not finite, in {self._layer(is_bad, self._bad_output)}"
        first, where = self.first_bad()
        if first is not None and first < began:
            reason += f"; the first of the run that was not finite was step {first}, in {where}"
        return reason

    def first_bad(self) -> tuple[int | None, str | None]:
        """Number of the run's first step with a loss or gradient that is not finite, and the layer where it arose."""
        session, guard = self._session, self._session.guard
        step = int(guard.first_bad_step) + 1
        if step < 1:
            return None, None
        in_these_weights = step > session.step - int(guard.skipped_in_a_row)
        return step, self._layer(guard.first_bad_parameters.tolist(), self._bad_output if in_these_weights else None)

    def _layer(self, is_bad: Sequence[bool], bad_output: str | None) -> str:
        """The layer where what is not finite arose.

        Args:
            is_bad: of each parameter, whether its gradient is not finite.
            bad_output: the first layer whose output is not finite, if that is known.
        """
        names = [name for name, _ in self._session.model.named_parameters()]
        bad_blocks = [name for name, bad in zip(names, is_bad, strict=True) if bad and name.startswith("blocks.")]
        if all(is_bad) or not bad_blocks:
            return bad_output or "the forward pass"
        # Backward runs from the last layer to the first and hands non-finite values on: it began in the last.
        return bad_blocks[-1].removesuffix(".weight")


@torch.no_grad()
def first_non_finite_output(model: GPT, forward: Callable[[], object]) -> str | None:
    """Name of the first module of `model`, in forward order, whose output in `forward` is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        # Hooks inside a compiled block are not called.
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None
