"""Where a step's milliseconds go: its kernels by category, and its GEMMs alone in BF16 and FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fp8lab.config import ModelConfig
from fp8lab.timing import gpu_milliseconds

PROFILED_STEPS = 2
GEMM_REPEATS = 10


def profile(step: Callable[[int], object]) -> dict[str, Any]:
    """Milliseconds a step by category, and of the longest kernels.

    Args:
        step: queues the step of a number on the GPU; warm.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for index in range(PROFILED_STEPS):
            step(index)
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in profiler.events():
        # Annotated regions are reported beside the kernels in them.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name] = kernels.get(event.name, 0.0) + event.device_time / 1e3 / PROFILED_STEPS
            calls[event.name] = calls.get(event.name, 0) + 1
    categories = dict.fromkeys(("gemm", "attention", "casts and elementwise", "optimizer", "other"), 0.0)
    for name, milliseconds in kernels.items():
        categories[kernel_category(name)] += milliseconds
    longest = sorted(kernels, key=lambda name: -kernels[name])[:40]
    return {
        "ms_by_category": categories,
        "longest": [
            {"kernel": name[:160], "ms": kernels[name], "calls": calls[name] / PROFILED_STEPS} for name in longest
        ],
    }


def kernel_category(name: str) -> str:
    """Which part of a step a CUDA kernel belongs to, by its name."""
    lower = name.lower()
    if any(part in lower for part in ("flash", "fmha", "sdpa", "mha")):
        return "attention"
    if "adam" in lower or "multi_tensor_apply" in lower:
        return "optimizer"
    if any(part in lower for part in ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk")):
        return "gemm"
    if lower.startswith(("triton_", "_")) or any(
        part in lower for part in ("elementwise", "reduce", "vectorized", "softmax", "copy", "cat", "fill")
    ):
        return "casts and elementwise"
    return "other"


def gemm_times(model: ModelConfig, tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each GEMM of a step alone, on random data, in BF16 and in FP8 with fast accumulation.

    Returns:
        For each Linear of a block, and the head: ``forward``, ``grad_input``, ``grad_weight`` and ``count``, the layers
        that have it; times keyed ``<gemm>_bf16`` and ``<gemm>_fp8``.
    """
    d, f = model.d_model, model.d_ff
    linears = {
        "qkv": (3 * d, d, model.n_layers),
        "output": (d, d, model.n_layers),
        "gate_up": (2 * f, d, model.n_layers),
        "down": (d, f, model.n_layers),
        "head": (model.vocab_size, d, 1),
    }
    times: dict[str, dict[str, float]] = {}
    for name, (out_features, in_features, count) in linears.items():
        times[name] = {"count": float(count)}
        shapes = {
            "forward": (tokens, in_features, out_features),
            "grad_input": (tokens, out_features, in_features),
            "grad_weight": (out_features, tokens, in_features),
        }
        for gemm, (m, k, n) in shapes.items():
            dtype = torch.float32 if gemm == "grad_weight" else torch.bfloat16
            times[name] |= {f"{gemm}_{key}": value for key, value in _gemm_time(m, k, n, dtype).items()}
    return times


def _gemm_time(m: int, k: int, n: int, dtype: torch.dtype) -> dict[str, float]:
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")

    def bf16() -> None:
        torch.mm(a, b.t(), out_dtype=dtype)

    def fp8() -> None:
        torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)

    return {"bf16": gpu_milliseconds(bf16, GEMM_REPEATS), "fp8": gpu_milliseconds(fp8, GEMM_REPEATS)}
