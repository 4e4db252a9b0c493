"""Transformer Engine's fused modules in place of the blocks' norms and Linears.

LayerNormLinear (with RMSNorm) for the norm and qkv, Linear for the output projection, LayerNormMLP (with RMSNorm
and SwiGLU) for the rest: the modules that its documentation recommends for a block. QK-norm, RoPE and the attention
core between them are the BF16 block's own, compiled as there. Weights are the model's FP32 parameters.

Recipes: ``te_bf16`` (its modules without FP8), ``te_current`` (Float8CurrentScaling) and ``te_delayed``
(DelayedScaling), both with its defaults. Delayed scaling updates its scales when its context closes, so one context
spans the whole forward pass.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.errors import UserError
from fp8lab.model import GPT, Attention, Block, apply_rope


def version() -> str:
    """What was measured, for the record."""
    try:
        return f"transformer-engine {package_version('transformer-engine')}"
    except PackageNotFoundError:
        return "transformer-engine, version unknown"


def convert(model: GPT, recipe: str) -> None:
    """Swap every block of `model`, whose parameters are on the GPU already."""
    engine = _engine()
    scaling = {
        "te_bf16": None,
        "te_current": engine.common.recipe.Float8CurrentScaling,
        "te_delayed": engine.common.recipe.DelayedScaling,
    }[recipe]
    for index in range(len(model.blocks)):
        block = model.blocks[index]
        assert isinstance(block, Block)
        model.blocks[index] = _EngineBlock(block, engine.pytorch)
    if scaling is not None:
        model.hidden = _inside(engine.pytorch, scaling(), model.hidden)  # type: ignore[method-assign]


def _engine() -> Any:
    try:
        _share_cudnn()
        import transformer_engine
        import transformer_engine.common.recipe
        import transformer_engine.pytorch
    except (ImportError, AssertionError, FileNotFoundError, OSError) as error:
        raise UserError(f"Transformer Engine is not installed, or does not load: {error}") from error
    return transformer_engine


def _share_cudnn() -> None:
    """Have the engine take the cuDNN that PyTorch came with, where that is a package and nothing else is chosen.

    The engine links all of cuDNN's libraries, of which PyTorch loads each when it first needs it. Those it has not
    loaded yet would be the system's, and libraries of two versions do not resolve each other's symbols.
    """
    if "CUDNN_HOME" in os.environ or "CUDNN_PATH" in os.environ:
        return
    try:
        found = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        found = None
    if found is None or not found.submodule_search_locations:
        return
    home = Path(next(iter(found.submodule_search_locations)))
    for library in sorted((home / "lib").glob("libcudnn*.so.*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["CUDNN_HOME"] = str(home)


def _inside(engine: Any, recipe: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def hidden(tokens: Tensor) -> Tensor:
        with engine.autocast(enabled=True, recipe=recipe):
            return forward(tokens)

    return hidden


class _Core(nn.Module):
    """From qkv to the attended values: what lies between two of the engine's modules."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.n_heads, self.head_dim = attention.n_heads, attention.head_dim
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = qkv.shape
        q, k, v = qkv.view(batch, seq, 3, self.n_heads, self.head_dim).unbind(2)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return attended.transpose(1, 2).reshape(batch, seq, -1)


class _EngineBlock(nn.Module):
    def __init__(self, block: Block, engine: Any) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        options = {"bias": False, "params_dtype": torch.float32, "device": "cuda"}
        norm = {"normalization": "RMSNorm", "eps": block.attention_norm.epsilon}
        d_model, d_ff = mlp.down.weight.shape
        self.qkv = engine.LayerNormLinear(d_model, 3 * d_model, **norm, **options)
        self.qkv.layer_norm_weight, self.qkv.weight = block.attention_norm.weight, attention.qkv.weight
        self.core = _Core(attention)
        self.output = engine.Linear(d_model, d_model, **options)
        self.output.weight = attention.output.weight
        self.mlp = engine.LayerNormMLP(d_model, d_ff, activation="swiglu", **norm, **options)
        self.mlp.layer_norm_weight = block.mlp_norm.weight
        self.mlp.fc1_weight, self.mlp.fc2_weight = mlp.gate_up.weight, mlp.down.weight

    def compile(self, *arguments: Any, **options: Any) -> None:
        """The core alone: the engine's modules are compiled kernels already."""
        self.core.compile(*arguments, **options)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.output(self.core(self.qkv(x), cos, sin))
        return x + self.mlp(x)
