"""A step's time from arithmetic: FLOPs over the rate of the GEMMs, bytes over the bandwidth.

A GEMM takes as long as its FLOPs or its bytes, whichever is longer; everything else in a step moves bytes. What FP8
gains is the GEMMs' time, and what it costs is the bytes of its casts, so a wide model gains and a narrow one loses,
and where the two meet follows from the memory's bandwidth. For one block, in bytes a row (d = d_model, f = d_ff):

====================  ===========  ==========================================================================
                      bytes a row  of which
====================  ===========  ==========================================================================
``bf16``              58 d + 18 f  each fused group of operations reads its inputs and writes its outputs once
``tensorwise``        + 56 d + 21 f  for each operand of each Linear: read for its amax (2), read and cast (3), and
                                   transpose the FP8 copy (2)
``fused``             the kernel map of `fp8lab.kernels`
====================  ===========  ==========================================================================

The rates are stated: `Device` and the constants below say where each comes from. One of them was fitted, the share of
a copy's bandwidth that compiled elementwise kernels reach, to BF16's step at 1.5B on an H200; every other size, width,
recipe and device is a prediction. What is left out: latency and launches, so that small micro-batches look better here
than they are, and that a kernel's arithmetic takes time too, so that the written kernels look better on an H200.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from fp8lab.config import ModelConfig, parameter_count
from fp8lab.errors import UserError
from fp8lab.flops import FP8_OUTPUT_GRADIENT_FROM, linear_weights


@dataclass(frozen=True)
class Device:
    """What a GPU can sustain."""

    name: str
    """In short: 'H200'."""
    record_name: str
    """As records have it, whole: other forms of a chip (PCIe, NVL, beside a Grace CPU) have other memory and power."""
    memory_bandwidth: float
    """Bytes a second: NVIDIA's data sheet."""


H200 = Device("H200", "NVIDIA H200", 4.8e12)
H100 = Device("H100", "NVIDIA H100 80GB HBM3", 3.35e12)
DEVICES = (H200, H100)
"""One chip under the same power limit, with other memory: only the bandwidth differs."""

SOURCE = "speed-h200/2026-11-24-a"
"""The record, among the speed records, that the H200's constants are held against."""
COPY_SHARE = 0.9
"""Of the data sheet's bandwidth that a copy reaches, rounded: 4.25 of 4.8 TB/s on an H200, by
``runs/records/benchmarks/kernels-NVIDIA-H200``; 3.0 of 3.35 on an H100, measured without a record."""
COMPILED_SHARE = 0.55
"""Of a copy's bandwidth that compiled elementwise kernels reach: fitted to BF16's step at 1.5B in `SOURCE`."""
WRITTEN_SHARE = 0.77
"""Of a copy's bandwidth that this project's kernels reach together, each as often as a block runs it: the mean of four
sizes, from 0.75 to 0.77, by ``runs/records/benchmarks/kernels-NVIDIA-H200``.

On an H100, whose memory is slower and whose processors are not, instructions cost them less of it.
"""
GEMM_FLOPS = {"bf16": 690e12, "fp8": 1320e12}
"""FLOP/s of large GEMMs under the power limit: the twelve of a 1.5B block alone on an H200, measured without a record.

`SOURCE` has the same GEMMs 6% faster, each timed for a few calls only.
"""
ATTENTION_FLOPS = {64: 246e12, 128: 363e12}
"""FLOP/s of cuDNN's causal attention, forward and backward, by head dimension: from BF16's profiles in `SOURCE`."""
OPTIMIZER_BYTES = 32
"""A parameter: fused AdamW reads four FP32 numbers and writes three; its gradient's norm reads one."""

RECIPES = ("bf16", "tensorwise", "fused")
"""What the model covers."""
RECOMPUTE_FROM = 2048
"""Width (`fp8lab.config.FusedConfig`) from which `fused` rotates q and k again."""


def fused_traffic(d: int, f: int) -> dict[str, int]:
    """Bytes a row of one block that each kernel of `fp8lab.kernels` moves, by `<pass> <kernel>`."""
    traffic = {
        "forward rms_norm": 2 * d + d,
        "forward norm_rotate": 4 * d + 4 * d,
        "forward quantise": 2 * d + d,
        "forward rms_norm of the sum": 4 * d + 2 * d + d,
        "forward swiglu": 4 * f + f,
        "forward add": 4 * d + 2 * d,
        "backward swiglu_backward": 4 * f + 2 * f + 4 * f + f,
        "backward rms_norm_backward of the MLP": 6 * d + 2 * d + d + d + d,
        "backward norm_rotate_backward": 12 * d + 6 * d,
        "backward rms_norm_backward of attention": 6 * d + 2 * d + d + d + d,
    }
    if d >= FP8_OUTPUT_GRADIENT_FROM:
        traffic["backward quantise_transposed"] = 2 * d + d
    else:
        traffic["backward rms_norm_backward of the MLP"] -= d  # no transposed copy
    if d >= RECOMPUTE_FROM:
        traffic["backward norm_rotate"] = 4 * d + 4 * d
    return traffic


def bf16_traffic(d: int, f: int) -> int:
    """Bytes a row of one BF16 block's elementwise work, each fused group once."""
    forward = (2 + 2) * d + (4 + 4) * d + (4 + 4) * d + (4 + 2) * f + (4 + 2) * d
    backward = (4 + 2) * f + (4 + 2) * f + (6 + 2) * d * 2 + (10 + 6) * d
    return forward + backward


def cast_traffic(d: int, f: int) -> int:
    """Bytes a row of one block that separate casts of every Linear's input and gradient add."""
    inputs, gradients = d + d + d + f, 3 * d + d + 2 * f + d
    return 7 * (inputs + gradients)


WEIGHT_CAST_BYTES = {"bf16": 6, "tensorwise": 11, "fused": 6}
"""A weight and micro-step: BF16 reads FP32 and writes BF16; the FP8 recipes write both layouts, `fused` in one pass."""
LOGITS_BYTES = 6
"""An entry of the logits: read twice, its gradient written once."""


def gemm_seconds(m: int, k: int, n: int, precision: str, out_bytes: int, bandwidth: float) -> float:
    """One GEMM of (m, k) by (k, n): its FLOPs at the sustained rate, or its bytes, whichever takes longer."""
    operand = 1 if precision == "fp8" else 2
    moved = operand * (m * k + k * n) + out_bytes * m * n
    return max(2 * m * k * n / GEMM_FLOPS[precision], moved / bandwidth)


def linear_seconds(tokens: int, d_in: int, d_out: int, precision: str, bandwidth: float) -> float:
    """The three GEMMs of a Linear."""
    return (
        gemm_seconds(tokens, d_in, d_out, precision, 2, bandwidth)
        + gemm_seconds(tokens, d_out, d_in, precision, 2, bandwidth)
        + gemm_seconds(d_out, tokens, d_in, precision, 4, bandwidth)
    )


def predict(model: ModelConfig, tokens: int, recipe: str, device: Device) -> dict[str, float]:
    """Milliseconds of each part of an optimizer step of one micro-batch, head in BF16.

    Args:
        tokens: of the micro-batch.
        recipe: one of `RECIPES`.

    Returns:
        gemm, attention, elementwise, head, optimizer.
    """
    d, f, layers = model.d_model, model.d_ff, model.n_layers
    bandwidth = device.memory_bandwidth * COPY_SHARE
    precision = "bf16" if recipe == "bf16" else "fp8"
    shapes = ((d, 3 * d), (d, d), (d, 2 * f), (f, d))
    gemm = layers * sum(linear_seconds(tokens, d_in, d_out, precision, bandwidth) for d_in, d_out in shapes)
    attention = 6 * layers * d * model.seq_len * tokens / ATTENTION_FLOPS[128 if model.head_dim > 64 else 64]
    if recipe == "fused":
        row_bytes, share = sum(fused_traffic(d, f).values()), WRITTEN_SHARE
    else:
        row_bytes, share = bf16_traffic(d, f) + (cast_traffic(d, f) if recipe == "tensorwise" else 0), COMPILED_SHARE
    weights = sum(count for name, count in linear_weights(model).items() if name != "head")
    cast = WEIGHT_CAST_BYTES[recipe] * weights
    elementwise = (layers * tokens * row_bytes + cast) / (bandwidth * share)
    head = linear_seconds(tokens, d, model.vocab_size, "bf16", bandwidth)
    head += LOGITS_BYTES * tokens * model.vocab_size / bandwidth
    optimizer = OPTIMIZER_BYTES * parameter_count(model) / bandwidth
    parts = {"gemm": gemm, "attention": attention, "elementwise": elementwise, "head": head, "optimizer": optimizer}
    return {name: seconds * 1e3 for name, seconds in parts.items()}


def step_ms(model: ModelConfig, tokens: int, recipe: str, device: Device) -> float:
    """Milliseconds of a whole step."""
    return sum(predict(model, tokens, recipe, device).values())


def ratio(model: ModelConfig, tokens: int, recipe: str, device: Device) -> float:
    """Tokens a second over BF16's."""
    return step_ms(model, tokens, "bf16", device) / step_ms(model, tokens, recipe, device)


def device_of(name: str) -> Device | None:
    """The device that a record's name ('NVIDIA H100 80GB HBM3') stands for, None if it is none of `DEVICES`."""
    return next((device for device in DEVICES if name == device.record_name), None)


MAP_WIDTHS = (256, 512, 768, 1024, 2048)
MAP_TOKENS = (8_192, 65_536)
MAP_SEQ = 1024


def map_model(width: int) -> ModelConfig:
    """The model of one width of the break-even map: four layers and a vocabulary so small that blocks are the step."""
    if width not in MAP_WIDTHS:
        raise UserError(f"the map's widths are {', '.join(map(str, MAP_WIDTHS))}, not {width}")
    d_ff = {256: 704, 512: 1408, 768: 2048, 1024: 2816, 2048: 5632}[width]
    n_heads = width // (128 if width >= RECOMPUTE_FROM else 64)
    return ModelConfig(
        name=f"w{width}", d_model=width, n_layers=4, n_heads=n_heads, d_ff=d_ff, vocab_size=2048, seq_len=MAP_SEQ
    )


def map_table(device: Device, recipes: Iterable[str] = ("fused", "tensorwise")) -> pd.DataFrame:
    """Predicted ratios of the map: columns width, tokens (of a micro-batch), recipe, ratio."""
    cells = [(recipe, tokens, width) for recipe in recipes for tokens in MAP_TOKENS for width in MAP_WIDTHS]
    ratios = [ratio(map_model(width), tokens, recipe, device) for recipe, tokens, width in cells]
    return pd.DataFrame(cells, columns=["recipe", "tokens", "width"]).assign(ratio=ratios)
