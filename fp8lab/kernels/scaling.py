"""Scales, amax histories and counters of the fused path.

A tensor is multiplied by its *quantise* scale before it is rounded to FP8, and the GEMM multiplies its
result by the *dequantise* scale, the inverse. The scale of this step comes from the largest magnitudes
(amax) of earlier steps: *delayed scaling* (FP8 Formats for Deep Learning, 2209.05433; Transformer
Engine's default). So the kernel that makes a tensor can write it in FP8 at once, in one pass over
memory, and gathers the amax for the next step on the way.

Every tensor that is quantised has a *slot*: its row of flat buffers over the whole model. Moving all
histories is then a handful of operations on one small tensor, once an optimizer step, however many
micro-steps or recomputations it had: until `Fp8State.end_step` an amax only grows, and a repeated
maximum changes nothing. Of several ranks it takes the largest, so that all scale alike.

A step that the guard skips is forgotten here too. Its gradients may be finite and huge, and one such amax
would set the scale of the next `FusedConfig.history` steps, under which everything in that slot is zero.

The first step has no history. While `Fp8State.calibrating`, each quantising kernel runs twice, the
first time only for its amax, so that the first step is scaled by its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp8lab.config import Fp8Format, FusedConfig

DTYPES: dict[Fp8Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALE_STRIDE = 4
"""Floats a slot: cuBLASLt reads scales at addresses that are multiples of 16 bytes."""
DEQUANTISE, QUANTISE = 0, 1
"""Places of the two scales in a slot."""


class Slot(NamedTuple):
    """Where one tensor's scales are read and its amax is gathered."""

    scale: Tensor
    """(4,) FP32: dequantise, quantise, two unused."""
    amax: Tensor
    """(4,) FP32: largest finite magnitude since the last step; at the step's end that times the scale; two unused."""
    dtype: torch.dtype
    """FP8 format."""

    @property
    def dequantise(self) -> Tensor:
        """Scalar that the GEMM multiplies by; 16-byte aligned."""
        return self.scale[DEQUANTISE]

    @property
    def limit(self) -> float:
        """Largest finite magnitude of the format."""
        return torch.finfo(self.dtype).max


def scales_for(amax: Tensor, limit: Tensor | float, settings: FusedConfig, previous: Tensor) -> Tensor:
    """Quantise scales that map `amax` onto `limit` less the margin; `previous` where amax says nothing (0)."""
    # A tensor of denormals would want a scale that overflows.
    scale = (limit * 2.0**-settings.margin / amax).clamp(max=2.0**100)
    if settings.power_of_two_scales:
        mantissa, _ = torch.frexp(scale)
        # Exact, unlike a power function.
        scale = scale / (2 * mantissa)
    return torch.where(amax > 0, scale, previous)


def set_current_scale(slot: Slot, settings: FusedConfig) -> None:
    """Scale `slot` by the amax gathered so far."""
    quantise = scales_for(slot.amax[0], slot.limit, settings, slot.scale[QUANTISE])
    slot.scale[QUANTISE] = quantise
    slot.scale[DEQUANTISE] = quantise.reciprocal()


class Fp8State(nn.Module):
    """Scales and histories of all slots; its buffers are part of a checkpoint."""

    scale: Tensor
    amax: Tensor
    history: Tensor
    steps: Tensor
    saturated_steps: Tensor
    underflowing_steps: Tensor
    limit: Tensor
    smallest_normal: Tensor
    _places: Tensor

    def __init__(self, formats: list[Fp8Format], settings: FusedConfig) -> None:
        """
        Args:
            formats: the format of each slot.
            settings: of the recipe.
        """
        super().__init__()
        self.settings = settings
        self._dtypes = [DTYPES[name] for name in formats]
        count = len(formats)
        self.register_buffer("scale", torch.ones(count, SCALE_STRIDE))
        self.register_buffer("amax", torch.zeros(count, SCALE_STRIDE))
        self.register_buffer("history", torch.zeros(settings.history, count))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("saturated_steps", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("underflowing_steps", torch.zeros(count, dtype=torch.int64))
        limits = torch.tensor([torch.finfo(dtype).max for dtype in self._dtypes])
        normals = torch.tensor([torch.finfo(dtype).smallest_normal for dtype in self._dtypes])
        self.register_buffer("limit", limits, persistent=False)
        self.register_buffer("smallest_normal", normals, persistent=False)
        self.register_buffer("_places", torch.arange(settings.history)[:, None], persistent=False)
        self._calibrating: bool | None = True
        """What the host knows; None: ask the device."""
        self._slots: list[Slot] | None = None

    @property
    def calibrating(self) -> bool:
        """True until a first step has been taken. So long, the host waits for the device at the end of each step."""
        if self._calibrating is None:
            self._calibrating = int(self.steps) == 0
        return self._calibrating

    def slots(self, first: int, count: int, *, record: bool) -> list[Slot]:
        """`count` slots from `first`.

        Args:
            record: gather amax into the histories; without it the slots are copies, and evaluation leaves no trace.
        """
        if not record:
            window = slice(first, first + count)
            return self._make_slots(self.scale[window].clone(), self.amax[window].clone(), self._dtypes[window])
        if self._slots is None:
            self._slots = self._make_slots(self.scale, self.amax, self._dtypes)
        return self._slots[first : first + count]

    @staticmethod
    def _make_slots(scale: Tensor, amax: Tensor, dtypes: list[torch.dtype]) -> list[Slot]:
        return [Slot(*parts) for parts in zip(scale.unbind(), amax.unbind(), dtypes, strict=True)]

    def quantise(self, slot: Slot, kernel: Callable[..., Any], *arguments: Any) -> Any:
        """Run a quantising `kernel`; on the first step twice, so that it is scaled by its own amax."""
        if self.calibrating:
            kernel(*arguments)
            set_current_scale(slot, self.settings)
        return kernel(*arguments)

    @torch.no_grad()
    def end_step(self, skipped: Tensor, largest_of_ranks: Callable[[Tensor], object] | None = None) -> None:
        """Move every history on by one step and set the next step's scales, unless the step was skipped.

        Args:
            skipped: boolean scalar on the device; True leaves histories, scales and counters as they were. Only the
                scales by which a first step was calibrated stay, and the next step is calibrated in its turn.
            largest_of_ranks: replaces a tensor by the largest values of any rank, in place; None: there is one rank.
        """
        taken = ~skipped
        amax, scaled = self.amax[:, 0], self.amax[:, 1]
        # Scaled before the ranks compare: in the first step each has scales of its own.
        torch.mul(amax, self.scale[:, QUANTISE], out=scaled)
        if largest_of_ranks is not None:
            largest_of_ranks(self.amax)
        self.saturated_steps += (scaled > self.limit) & taken
        self.underflowing_steps += (amax > 0) & (scaled < self.smallest_normal) & taken
        now = (self._places == self.steps % self.settings.history) & taken
        self.history.copy_(torch.where(now, amax, self.history))
        previous = self.scale[:, QUANTISE]
        quantise = scales_for(self.history.amax(0), self.limit, self.settings, previous)
        self.scale[:, QUANTISE] = torch.where(taken, quantise, previous)
        self.scale[:, DEQUANTISE] = self.scale[:, QUANTISE].reciprocal()
        self.amax.zero_()
        self.steps += taken
        if self.calibrating:
            self._calibrating = int(self.steps) == 0

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._calibrating = None

    def _apply(self, *arguments: Any, **keywords: Any) -> Fp8State:
        self._slots = None
        return super()._apply(*arguments, **keywords)
