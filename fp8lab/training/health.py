"""FP8 health: what rounding does to each tensor, measured every `health_interval` steps.

An FP8 GEMM has three operands to lose information in: a Linear's input, its weight and grad_output. For
each: the largest magnitude (amax), the recipe's scale, and what is lost by rounding at that scale,

- *underflow*: the share of nonzero values that become zero;
- *saturation*: the share of values clipped, those farther above the format's largest number than rounding
  goes. Scales that follow the very tensor (torchao's) leave none; delayed ones (`fused`) do where a tensor
  outgrows its history;
- *SQNR*: the signal's power over the rounding error's, in dB. E4M3 has about 31.5, E5M2 25.5, whatever the
  scale, until much is lost at either end. Alone it is blind: an outlier that inflates the amax a thousand
  times leaves the rest of a Gaussian tensor at 31.6 dB while its underflow rises from 0.001% to almost 1%.

Underflow, overflow and signal-to-noise ratio are the measures of FP8-LM (2310.18313). Kurtosis of the input
(3 for a Gaussian) shows outliers before they cost anything (2405.19279), and the norm of each weight's
gradient is the training step's own. Tensors that a run does not round to FP8 have an amax, a kurtosis and a
gradient norm alone.

**How it is measured: a probe beside the step.** Reading the tensors inside the compiled blocks would break
their graphs or undo their fusion, at every step, and `fused` never writes most of them in high precision.
So on a measured step, after the gradients and before the optimizer, a plain eager model over the same
weights runs forward and backward on the first sequences of the step's batch, and hooks on its Linears take
the statistics. Nothing of the run changes, not a bit: the probe asks for no gradient of a weight, reads
copies of the scales and histories, and nothing in it is random. The blocks are not compiled again.

What that means for the numbers:

- The probe computes in BF16, with the run's own weights: its tensors are those that the run rounds, less
  the rounding errors of the layers before.
- Its loss is weighted so that grad_output has the magnitude that it has in the step.
- It sees at most `PROBE_TOKENS` tokens. Fractions and ratios need no more; an amax is a lower bound of the
  whole batch's, so a scale recomputed from it is an upper one. `fused` is rounded by its real scales, and
  `overflow_counts` says in how many steps a whole tensor left its range: those are counted at every step.
- Row-wise scales differ by row, and the smallest is reported, which belongs to the amax. A GEMM that
  contracts another dimension wants other rows (grad_weight's): shown are those of the input and weight in
  the forward pass, and of grad_output in grad_input's GEMM.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from fp8lab.config import Recipe, RunConfig
from fp8lab.cpu import bf16_autocast
from fp8lab.errors import UserError
from fp8lab.kernels import FusedBlock
from fp8lab.kernels.block import SLOT_ROLES
from fp8lab.kernels.scaling import DTYPES, QUANTISE
from fp8lab.loss import training_loss
from fp8lab.model import GPT
from fp8lab.training.metrics import Arrivals

log = logging.getLogger(__name__)

TensorName = Literal["input", "weight", "grad_output"]
TENSORS: tuple[TensorName, ...] = get_args(TensorName)
"""Operands of a Linear's three GEMMs."""
VALUES = (
    "amax",
    "scale",
    "underflow_fraction",
    "saturation_fraction",
    "sqnr_db",
    "kurtosis",
    "gradient_norm",
)
COLUMN_TYPES = {"step": "int64", "layer": "str", "tensor": "str"} | dict.fromkeys(VALUES, "float32")
PROBE_TOKENS = 4096
"""Tokens that a probe looks at, in whole sequences; never more than a quarter of a micro-batch, but at least one."""
_TORCHAO_SMALLEST_AMAX = 1e-12


class Rounding(NamedTuple):
    """How a recipe rounds one tensor."""

    scale: Tensor
    """Multiplies the tensor before it is rounded: a scalar, or (rows, 1)."""
    dtype: torch.dtype
    """FP8 format."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (rows, features) FP32 after scaling, before and after rounding; both FP32."""
        limit = torch.finfo(self.dtype).max
        scaled = x * self.scale
        return scaled, scaled.clamp(-limit, limit).to(self.dtype).float()


def dynamic_rounding(recipe: Recipe, tensor: TensorName, x: Tensor) -> Rounding:
    """How a recipe of torchao rounds `x` (rows, features) FP32, by its own amax."""
    rowwise = recipe != "tensorwise"
    dtype = DTYPES["e5m2" if tensor == "grad_output" and not rowwise else "e4m3"]
    amax = torch.linalg.vector_norm(x, torch.inf, dim=-1 if rowwise else None, keepdim=rowwise)
    scale = (torch.finfo(dtype).max / amax.double().clamp(min=_TORCHAO_SMALLEST_AMAX)).float()
    if rowwise:
        mantissa, _ = torch.frexp(scale)
        scale = scale / (2 * mantissa)
    return Rounding(scale, dtype)


def _clipped_above(dtype: torch.dtype) -> float:
    """Halfway from the format's largest number to the one that would come next, had it one: 464 for E4M3.

    A scale taken from the amax may exceed its aim by a last bit, and that clips nothing.
    """
    finfo = torch.finfo(dtype)
    _, exponent = math.frexp(finfo.max)
    return finfo.max + math.ldexp(finfo.eps, exponent - 1) / 2


def rounding_sums(x: Tensor, rounding: Rounding) -> tuple[Tensor, ...]:
    """What `losses` needs of `x` (rows, features) FP32: six scalars.

    A small model's probe is bound by the number of operations that the host queues, so the rest is done for all
    tensors at once.
    """
    scaled, stored = rounding(x)
    scale, error = rounding.scale, stored - scaled
    if scale.ndim:
        # Rows are compared at one common scale.
        scale = scale.amin()
        share = scale / rounding.scale
        signal, noise = scaled * share, error * share
    else:
        signal, noise = scaled, error
    return (
        scale,
        torch.count_nonzero(x),
        torch.count_nonzero(stored),
        (scaled.abs() > _clipped_above(rounding.dtype)).mean(dtype=torch.float32),
        torch.linalg.vector_norm(signal),
        torch.linalg.vector_norm(noise),
    )


def losses(sums: Tensor) -> Tensor:
    """Scale, underflow fraction, saturation fraction and SQNR (dB): (..., 4) of `rounding_sums` (..., 6)."""
    scale, nonzero, kept, saturated, signal, noise = sums.unbind(-1)
    return torch.stack((scale, (nonzero - kept) / nonzero, saturated, 20 * torch.log10(signal / noise)), dim=-1)


def kurtosis(x: Tensor) -> Tensor:
    """Fourth moment of all values about their mean, over the squared variance: 3 for a Gaussian."""
    squares = (x - x.mean()).square()
    return squares.square().mean() / squares.mean().square()


class HealthProbe:
    """Measures a run's tensors on a plain model that shares its weights."""

    def __init__(self, config: RunConfig, model: GPT, plain: GPT, conversion: Sequence[Mapping[str, str]]) -> None:
        """
        Args:
            config: the run's; `health_layers` are patterns on Linears' names.
            model: the model being trained, converted.
            plain: a model over the same weights in which nothing is converted or compiled.
            conversion: what `fp8lab.precision.convert` said of each Linear.

        Raises:
            UserError: a pattern that matches no Linear.
        """
        self._config, self._model, self._plain = config, model, plain
        self._precision: dict[str, Any] = {row["name"]: row["precision"] for row in conversion}
        linears = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
        self._linears = {name: linears[name] for name in _matching(config.health_layers, list(linears))}
        parameters = [name for name, _ in model.named_parameters()]
        self._parameter = {name: parameters.index(f"{name}.weight") for name in self._linears}

    @property
    def rows(self) -> list[tuple[str, TensorName]]:
        """Linear and tensor of each row that `measure` returns."""
        return [(name, tensor) for name in self._linears for tensor in TENSORS]

    def measure(self, batch: Tensor, gradient_norms: Tensor) -> Tensor | None:
        """Statistics of the weights as they stand, on the first sequences of `batch`; nothing waits for the device.

        Args:
            batch: (rows, seq_len + 1) token ids of this process's part of the step.
            gradient_norms: (parameters,) norms of the step's gradients, in the model's order.

        Returns:
            (rows, 7) FP32: a row for each of `rows`, the columns `VALUES`, NaN where there is none. None if the
            device has no memory for it: training goes on.
        """
        noted: dict[tuple[str, TensorName], Tensor] = {}
        try:
            with self._hooks(noted, self._fused_roundings(), gradient_norms):
                self._forward_backward(batch)
        except torch.OutOfMemoryError:
            log.warning("no memory for a health probe of %s: this step is not measured", self._config.run)
            return None
        amax, *sums, kurtoses, norms = torch.stack([noted[row] for row in self.rows]).split([1, 6, 1, 1], dim=-1)
        return torch.cat((amax, losses(sums[0]), kurtoses, norms), dim=-1)

    def _forward_backward(self, batch: Tensor) -> None:
        config, plain = self._config, self._plain
        share = min(config.micro_batch, len(batch)) * config.model.seq_len // 4
        tokens = batch[: max(1, min(PROBE_TOKENS, share) // config.model.seq_len)]
        embedded: list[Tensor] = []

        def begin(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        # The graph begins at the embeddings: no gradient of a weight is computed.
        handle = plain.embedding.register_forward_hook(begin)
        try:
            with bf16_autocast(batch.device):
                hidden = plain.hidden(tokens[:, :-1])
                objective, _ = training_loss(plain, hidden, tokens[:, 1:], config.optimizer.z_loss)
        finally:
            handle.remove()
        torch.autograd.grad(objective * (len(tokens) * config.model.seq_len / config.global_batch_tokens), embedded)

    def _fused_roundings(self) -> dict[tuple[str, str], Rounding]:
        """How each tensor of a fused block is rounded in this step."""
        return {
            (f"blocks.{index}.{linear}", tensor): Rounding(slot.scale[QUANTISE], slot.dtype)
            for index, block in enumerate(self._model.blocks)
            if isinstance(block, FusedBlock)
            for (linear, tensor), slot in zip(SLOT_ROLES, block.slots(record=False), strict=True)
        }

    @contextmanager
    def _hooks(
        self,
        noted: dict[tuple[str, TensorName], Tensor],
        roundings: Mapping[tuple[str, str], Rounding],
        gradient_norms: Tensor,
    ) -> Iterator[None]:
        """While it lasts, the plain model notes of each tensor: amax, `rounding_sums`, kurtosis and gradient norm."""
        absent = torch.full((), torch.nan, device=gradient_norms.device)

        @torch.no_grad()
        def note(name: str, tensor: TensorName, x: Tensor) -> None:
            precision = self._precision[name]
            x = x.detach().flatten(0, -2).float()
            sums: tuple[Tensor, ...] = (absent,) * 6
            if precision != "bf16":
                sums = rounding_sums(x, roundings.get((name, tensor)) or dynamic_rounding(precision, tensor, x))
            noted[name, tensor] = torch.stack(
                (
                    torch.linalg.vector_norm(x, torch.inf),
                    *sums,
                    kurtosis(x) if tensor == "input" else absent,
                    gradient_norms[self._parameter[name]] if tensor == "weight" else absent,
                )
            )

        def watch(name: str) -> Any:
            def hook(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
                note(name, "input", inputs[0])
                note(name, "weight", linear.weight)
                output.register_hook(lambda grad: note(name, "grad_output", grad))

            return hook

        handles = [linear.register_forward_hook(watch(name)) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"health_layers: {pattern!r} matches no Linear; names are {', '.join(names[:4])}, ...")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


class HealthLog:
    """Rows of ``health.parquet``, in order of steps."""

    def __init__(self, device: torch.device, table: pd.DataFrame | None = None) -> None:
        self._tables = [] if table is None else [table]
        self._arrivals: Arrivals[tuple[int, list[tuple[str, TensorName]]]] = Arrivals(device)

    def add(self, step: int, rows: list[tuple[str, TensorName]], values: Tensor) -> None:
        """Note what a probe measured at `step` (this one included): `values` (rows, 7) on the device."""
        self._arrivals.add((step, rows), values)

    def flush(self, *, wait: bool) -> None:
        """As `fp8lab.training.metrics.MetricsLog.flush`."""
        for (step, rows), values in self._arrivals.flush(wait=wait):
            layers, tensors = zip(*rows, strict=True)
            table = pd.DataFrame(values.numpy(), columns=list(VALUES))
            self._tables.append(table.assign(step=step, layer=layers, tensor=tensors))

    def table(self) -> pd.DataFrame:
        """All rows that have arrived."""
        empty = pd.DataFrame(columns=list(COLUMN_TYPES)).astype(COLUMN_TYPES)
        return pd.concat([empty, *self._tables], ignore_index=True).astype(COLUMN_TYPES)


class OverflowCounts(NamedTuple):
    """Steps in which a whole tensor of a fused run left its format's range, by 'layer tensor'; none where zero."""

    saturated: dict[str, int]
    """Its amax exceeded the format's largest number: the largest values were clipped."""
    underflowing: dict[str, int]
    """Its amax was below the format's smallest normal number."""


def overflow_counts(model: GPT) -> OverflowCounts | None:
    """What a fused model's scales have counted since the run, or its branch, began; None for another recipe.

    Waits for the device.
    """
    state = getattr(model, "fp8_state", None)
    if state is None:
        return None
    names = [
        f"blocks.{index}.{linear} {tensor}"
        for index, block in enumerate(model.blocks)
        if isinstance(block, FusedBlock)
        for linear, tensor in SLOT_ROLES
    ]
    return OverflowCounts(
        *(
            {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
            for counts in (state.saturated_steps, state.underflowing_steps)
        )
    )


def forget_overflows(model: GPT) -> None:
    """Let a fused model's scales count from now on; the scales and their histories stay."""
    state = getattr(model, "fp8_state", None)
    if state is not None:
        state.saturated_steps.zero_()
        state.underflowing_steps.zero_()
