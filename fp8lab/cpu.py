"""Training on a CPU, no slower than it must be.

A tensor core multiplies BF16 operands exactly, adds the products in FP32 and rounds the sum to BF16 once. A CPU with
BF16 instructions does the same. On one without (no AVX-512), torch falls back on a scalar loop, more than ten times
slower than FP32's GEMM. There the operands are widened to FP32, which is exact, and FP32's GEMM does the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
WIDENED = ("mm", "_scaled_dot_product_flash_attention_for_cpu_backward")
"""Operators whose BF16 kernels are slow without BF16 instructions: all GEMMs, and those inside attention's backward."""


def bf16_autocast(device: torch.device) -> torch.autocast:
    """The autocast under which every model here runs: GEMMs in BF16 on `device`."""
    if device.type == "cpu" and not multiplies_bf16():
        _widen_bf16_products()
    return torch.autocast(device.type, torch.bfloat16)


def multiplies_bf16() -> bool:
    """True where torch has a BF16 GEMM for this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _widen_bf16_products() -> torch.library.Library:
    """Replace the CPU's kernels of `WIDENED`, below autograd, for as long as the process lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch warns of every kernel that replaces one of its own.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name in WIDENED:
            library.impl(name, _widened(torch.library.get_kernel(f"aten::{name}", "CPU")), "CPU")
    return library


def _widened(kernel: Any) -> Callable[..., Any]:
    """`kernel`, computing in FP32 what is asked in BF16."""

    def compute(*operands: Any, **options: Any) -> Any:
        if operands[0].dtype is not torch.bfloat16:
            return kernel.call_boxed(CPU, *operands, **options)
        operands = tuple(operand.float() if isinstance(operand, Tensor) else operand for operand in operands)
        result = kernel.call_boxed(CPU, *operands, **options)
        return result.bfloat16() if isinstance(result, Tensor) else tuple(part.bfloat16() for part in result)

    return compute


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next step instead of returning it to the kernel.

    Faulting it in again at every step costs a CPU run up to a fifth of its speed. Does nothing without glibc.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)
