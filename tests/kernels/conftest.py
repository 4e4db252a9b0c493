from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = "TRITON_INTERPRET" in os.environ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture
def device() -> torch.device:
    """The GPU, where kernels run compiled, or the CPU, where Triton interprets them."""
    return torch.device("cpu" if INTERPRETED else "cuda")


TORCH_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}


def _convert_float(values: np.ndarray, source: Any, target: Any, _rounding: Any) -> np.ndarray:
    """`values`, the bits of floats of one Triton type, as bits of another, rounded to nearest even as GPUs do."""
    bits = np.ascontiguousarray(values).view(getattr(np, f"int{source.primitive_bitwidth}"))
    converted = torch.from_numpy(bits.copy()).view(TORCH_TYPES[source.name]).to(TORCH_TYPES[target.name])
    integer = getattr(torch, f"int{target.primitive_bitwidth}")
    return converted.view(integer).numpy().view(getattr(np, f"uint{target.primitive_bitwidth}"))


@pytest.fixture(autouse=True)
def _exact_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend two faults of Triton 3.6's interpreter.

    Rounding up to the next power of two does not carry into the exponent (31.5 becomes 16 in E4M3), and loop bounds
    given as arguments are read in a way that NumPy 2.4 refuses.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Sequence[Any]) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
