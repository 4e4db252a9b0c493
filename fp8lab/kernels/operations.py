"""Which implementation computes: the Triton kernels, or their plain-PyTorch reference."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fp8lab.kernels import reference


def operations(emulate: bool) -> ModuleType:
    """`fp8lab.kernels.reference` to emulate, else `fp8lab.kernels.triton_ops`: the same functions."""
    if emulate:
        return reference
    # Triton comes with torch's CUDA build alone.
    from fp8lab.kernels import triton_ops

    return triton_ops


def bf16_grad_weight(grad: Tensor, inputs: Tensor) -> Tensor:
    """Weight gradient (out, in) FP32 of BF16 matrices (rows, out) and (rows, in)."""
    if grad.device.type == "cpu":
        return grad.float().t() @ inputs.float()
    return torch.mm(grad.t(), inputs, out_dtype=torch.float32)
