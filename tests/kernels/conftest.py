from __future__ import annotations

import os
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

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
    converted = _rounded(torch.from_numpy(bits.copy()).view(TORCH_TYPES[source.name]), TORCH_TYPES[target.name])
    integer = getattr(torch, f"int{target.primitive_bitwidth}")
    return converted.view(integer).numpy().view(getattr(np, f"uint{target.primitive_bitwidth}"))


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize > 1:
        return values.to(dtype)
    # The hardware's only conversion to FP8 saturates, infinities too.
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


class _Assembly(NamedTuple):
    """What a line of assembly returns."""

    result: Any

    def get_result(self, _position: int) -> Any:
        return self.result


def _inline_assembly(_builder: Any, line: str, _constraints: str, values: Sequence[Any], *_: Any) -> _Assembly:
    """The two instructions that the kernels name themselves, as PTX defines them."""
    from triton.language import float32, int16
    from triton.runtime.interpreter import TensorHandle

    if line == "rcp.approx.ftz.f32 $0, $1;":
        return _Assembly(TensorHandle(1 / values[0].data, float32))
    packed = re.fullmatch(r"cvt\.rn\.satfinite\.(e4m3|e5m2)x2\.f32 \$0, \$(\d), \$(\d);", line)
    assert packed is not None, line
    # Of a result of two bytes the first operand becomes the upper one.
    upper, lower = (values[int(packed[place]) - 1].data for place in (2, 3))
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[packed[1]]
    upper, lower = (_rounded(torch.from_numpy(part), dtype).view(torch.uint8).numpy() for part in (upper, lower))
    return _Assembly(TensorHandle((lower.astype(np.uint16) | upper.astype(np.uint16) << 8).view(np.int16), int16))


@pytest.fixture(autouse=True)
def _exact_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend three faults of Triton's interpreter (3.6 to 3.9), and teach it the assembly that the kernels use.

    Rounding up to the next power of two does not carry into the exponent (31.5 becomes 16 in E4M3); loop bounds given
    as arguments are read in a way that NumPy 2.4 refuses; and every call of a function within a kernel wraps the
    language once more, for good, so that each takes longer than the one before.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", _inline_assembly)
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Sequence[Any]) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter, "_patch_lang", _WrapOnce(interpreter))


class _WrapOnce:
    """The interpreter's `_patch_lang`, doing nothing where the kernel that runs has wrapped the language already."""

    def __init__(self, interpreter: ModuleType) -> None:
        self._wrap, self._languages = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
        self._scope = interpreter._LangPatchScope()
        self._wrapped: set[str] = set()

    def __call__(self, function: Any) -> Any:
        # A kernel restores all changes when it ends.
        if not self._scope._changes:
            self._wrapped.clear()
        seen = {value.__name__ for value in function.__globals__.values() if any(value is a for a in self._languages)}
        if not seen <= self._wrapped:
            self._scope._changes += self._wrap(function)._changes
            self._wrapped |= seen
        return self._scope
