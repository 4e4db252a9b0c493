"""The swap: which Linear computes in which precision.

Training a Linear costs three GEMMs::

    output      (tokens, out) = input       (tokens, in)  @ weight^T  (in, out)
    grad_input  (tokens, in)  = grad_output (tokens, out) @ weight    (out, in)
    grad_weight (out, in)     = grad_output^T (out, tokens) @ input   (tokens, in)

In FP8 each operand is multiplied by a scale that maps its largest magnitude (amax) onto the largest
number of the format (E4M3: 448; E5M2: 57,344) and rounded; the product of tensor cores is divided by both scales.
Tensor cores sum the products in FP32 or, with fast accumulation, in fewer bits: torchao in ``output``'s
GEMM alone, ``fused`` in all three. The recipes differ in who shares a scale and what stays in BF16:

========================  ========================================================================
``bf16``                  no swap: autocast's BF16 GEMMs
``tensorwise``            torchao: one scale a tensor; E4M3 input and weight, E5M2 grad_output
``rowwise``               torchao: one power-of-two scale a row of each GEMM's operand; E4M3 throughout
``rowwise_with_gw_hp``    torchao: as rowwise, but one scale for grad_input's weight, and grad_weight's GEMM in BF16
``fused``                 `fp8lab.kernels`: casts fused into the neighbouring operations
========================  ========================================================================

The head is BF16 in every recipe unless asked otherwise; in FP8 it runs through `fp8lab.kernels.head`.
The scales of torchao's recipes are dynamic: computed from the very tensor that they scale. Formats
and per-tensor scaling: FP8 Formats for Deep Learning (2209.05433). Weights stay FP32 parameters under
unchanged names, so checkpoints interchange between recipes.

`convert` reports on every Linear, and refuses what would silently train something else than asked:
an exclusion that matches nothing, or a recipe that converts nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import nn

from fp8lab.config import RECIPES, FusedConfig, Head, ModelConfig, Recipe
from fp8lab.errors import UserError
from fp8lab.kernels import Fp8TiedHead, convert_blocks
from fp8lab.model import GPT
from fp8lab.units import ranges

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

TORCHAO_RECIPES: tuple[Recipe, ...] = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
FP8_MULTIPLE = 16
"""torch._scaled_mm wants every dimension of an FP8 GEMM's operands to be a multiple of this."""

FP8_COMPUTE_CAPABILITY = (8, 9)
"""First CUDA compute capability with FP8 tensor cores (Ada; Hopper is 9.0)."""


def fp8_tensor_cores() -> bool:
    """True where FP8 GEMMs run in hardware; elsewhere recipes are emulated."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_COMPUTE_CAPABILITY


def uses_fp8(recipe: Recipe, head: Head) -> bool:
    """True where any GEMM is asked to run in FP8."""
    return recipe != "bf16" or head == "fp8"


def convert(
    model: GPT,
    recipe: Recipe,
    head: Head = "bf16",
    high_precision: Sequence[str] = (),
    emulate: bool | None = None,
    fused: FusedConfig | None = None,
) -> list[dict[str, str]]:
    """Swap the Linears of `model` in place. Call it before torch.compile and before sharding.

    Args:
        model: the model with FP32 weights.
        recipe: precision of the blocks' Linears.
        head: precision of the output head's GEMMs.
        high_precision: shell patterns on Linears' names; the matching ones stay in BF16.
        emulate: compute FP8 by rounding operands and multiplying in FP32. None: where there are no FP8 tensor cores.
        fused: how ``fused`` computes; as by default if None.

    Returns:
        One row a Linear, and one for the head: name, shape ('out x in'), precision, reason.

    Raises:
        UserError: unknown recipe, a pattern that matches nothing, or a recipe that converts nothing.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe: {recipe!r} does not exist; accepted: {', '.join(RECIPES)}")
    if emulate is None:
        emulate = not fp8_tensor_cores()
    rows = [
        _linear_row(name, linear, recipe, high_precision)
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    _check_patterns(high_precision, [row["name"] for row in rows])
    converted = {row["name"] for row in rows if row["reason"] == "converted"}
    if recipe != "bf16" and not converted:
        reasons = ", ".join(sorted({row["reason"] for row in rows}))
        raise UserError(f"recipe: {recipe} would convert no Linear of {model.config.name} ({reasons})")
    if recipe == "fused":
        _convert_fused(model, converted, emulate, fused)
    elif recipe != "bf16":
        _convert_torchao(model, recipe, converted, emulate)
    rows.append(_convert_head(model, head, emulate))
    return rows


def check_kernels(model: ModelConfig, recipe: Recipe, head: Head, device: torch.device) -> None:
    """Hold this project's kernels against their references, those that a model of `recipe` and `head` runs on.

    Raises:
        fp8lab.kernels.check.WrongKernel: this machine's Triton compiles one of them wrongly.
    """
    if device.type != "cuda":
        return
    # Triton comes with torch's CUDA build alone.
    from fp8lab.kernels import check

    check.check_loss(model, device)
    if recipe == "fused" and fp8_tensor_cores():
        check.check_blocks(model, device)
    if head == "fp8" and fp8_tensor_cores():
        check.check_head(model, device)


def conversion_table(rows: Sequence[dict[str, str]]) -> Table:
    """The rows of `convert` as a rich table; layers that differ only in the block's number share a line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        parts = row["name"].split(".")
        block = parts[1] if parts[0] == "blocks" else ""
        kind = ".".join(["blocks", "*", *parts[2:]]) if block else row["name"]
        groups.setdefault((kind, row["shape"], row["precision"], row["reason"]), []).append(block)
    table = Table("Linear", "blocks", "shape (out x in)", "precision", "reason")
    for (kind, shape, precision, reason), blocks in groups.items():
        table.add_row(kind, ranges(int(block) for block in blocks if block), shape, precision, reason)
    return table


def _linear_row(name: str, linear: nn.Linear, recipe: Recipe, high_precision: Sequence[str]) -> dict[str, str]:
    out_features, in_features = linear.weight.shape
    pattern = next((pattern for pattern in high_precision if fnmatchcase(name, pattern)), None)
    precision = "bf16"
    if recipe == "bf16":
        reason = "recipe bf16"
    elif pattern is not None:
        reason = f"excluded by {pattern!r}"
    elif out_features % FP8_MULTIPLE or in_features % FP8_MULTIPLE:
        reason = f"shape not a multiple of {FP8_MULTIPLE}"
    else:
        precision, reason = recipe, "converted"
    return {"name": name, "shape": f"{out_features} x {in_features}", "precision": precision, "reason": reason}


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = ", ".join(names[:4])
            raise UserError(f"high_precision: {pattern!r} matches no Linear; names are {example}, ...")


def _torchao_config(recipe: Recipe, emulate: bool) -> Float8LinearConfig:
    with _quiet_import():
        from torchao.float8 import Float8LinearConfig
    # Fast accumulation only in `output`'s GEMM, as torchao ships it.
    return dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao warns at import about compiled extensions that float8 training does not use."""
    names = ("torchao", "torch.utils._pytree", "")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _convert_torchao(model: GPT, recipe: Recipe, names: set[str], emulate: bool) -> None:
    config = _torchao_config(recipe, emulate)
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)


def _convert_fused(model: GPT, names: set[str], emulate: bool, settings: FusedConfig | None) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left_out = sorted(set(linears) - names)
    convert_blocks(model, emulate=emulate, high_precision=left_out, settings=settings)


def _convert_head(model: GPT, head: Head, emulate: bool) -> dict[str, str]:
    vocab_size, d_model = model.embedding.weight.shape
    row = {"name": "head", "shape": f"{vocab_size} x {d_model}", "precision": "bf16", "reason": "head: bf16"}
    if head == "bf16":
        return row
    if vocab_size % FP8_MULTIPLE or d_model % FP8_MULTIPLE:
        raise UserError(f"head: fp8 needs vocab_size and d_model to be multiples of {FP8_MULTIPLE}, not {row['shape']}")
    model.head = Fp8TiedHead(emulate=emulate)
    return row | {"precision": "fp8", "reason": "converted (tied to the embedding)"}
