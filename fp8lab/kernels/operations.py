"""Which implementation computes: the Triton kernels, or their plain-PyTorch reference."""

from __future__ import annotations

from types import ModuleType

from fp8lab.kernels import reference


def operations(emulate: bool) -> ModuleType:
    """`fp8lab.kernels.reference` to emulate, else `fp8lab.kernels.triton_ops`: the same functions."""
    if emulate:
        return reference
    # Triton comes with torch's CUDA build alone.
    from fp8lab.kernels import triton_ops

    return triton_ops
