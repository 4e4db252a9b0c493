"""Each contestant's model: one set of weights, converted to its recipe.

Two recipes have a variant that differs in how GEMMs add up (see `fp8lab.precision`), to tell what that is worth:
``tensorwise_fast`` keeps the sums of all three in the tensor cores, as ``fused`` does, and ``fused_precise`` adds up
those of weight gradients in FP32. ``fused_e5m2`` has its gradients in E5M2.

Peers are other projects' FP8 (Transformer Engine, nanochat), swapped into the same model by a module in
``runs/peers/``. Such a module is loaded only when a plan names its recipe.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from fp8lab.config import GEMMS, FusedConfig, ModelConfig, Recipe
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.precision import check_kernels, convert, fp8_tensor_cores
from fp8lab.speed.plan import Contestant

PEERS = {
    "te_bf16": "te_adapter",
    "te_current": "te_adapter",
    "te_delayed": "te_adapter",
    "nanochat": "nanochat_adapter",
}
"""Names of peers in plans and records, and the module in ``runs/peers/`` that converts a model to each."""
_FUSED = {
    "fused": FusedConfig(),
    "fused_precise": FusedConfig(fast_accumulation=("output", "grad_input")),
    "fused_e5m2": FusedConfig(gradient_format="e5m2"),
}
PEERS_DIR = Path(__file__).parents[2] / "runs" / "peers"


def build(weights: GPT, contestant: Contestant) -> tuple[GPT, str | None]:
    """A model over the parameters of `weights`, converted but not compiled; and the version of a peer's code."""
    model = _sharing_weights(weights)
    if contestant.recipe in PEERS:
        peer = load_peer(contestant.recipe)
        peer.convert(model, contestant.recipe)
        return model, peer.version()
    if contestant.recipe == "tensorwise_fast":
        _convert_tensorwise_fast(model)
        return model, None
    settings = fused_settings(contestant)
    recipe: Recipe = "fused" if settings else contestant.recipe  # type: ignore[assignment]
    check_kernels(weights.config, recipe, contestant.head, weights.embedding.weight.device)
    convert(model, recipe, contestant.head, fused=settings)
    return model, None


def fused_settings(contestant: Contestant) -> FusedConfig | None:
    """How this project's blocks compute in a contestant that has them: for the record, where a name may not last."""
    return _FUSED.get(contestant.recipe)


def initialised(config: ModelConfig, seed: int, device: torch.device) -> GPT:
    """A model with weights drawn on the device: drawing 1.5 billion on the CPU takes longer than timing them."""
    with device:
        model = GPT(config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            depth = (2 * config.n_layers) ** -0.5 if name.endswith(("output.weight", "down.weight")) else 1.0
            parameter.normal_(0.0, 0.02 * depth, generator=generator)
    return model


def _sharing_weights(source: GPT) -> GPT:
    """Another model over the parameters of `source`."""
    with torch.device("meta"):
        model = GPT(source.config)
    for name, parameter in source.named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameter)
    model.cos, model.sin = source.cos, source.sin
    return model


def load_peer(recipe: str) -> ModuleType:
    """The module that converts a model to a peer: ``convert(model, recipe)`` and ``version()``.

    Raises:
        UserError: it is not there: the package was installed without its repository.
    """
    path = PEERS_DIR / f"{PEERS[recipe]}.py"
    spec = importlib.util.spec_from_file_location(f"fp8lab_peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UserError(f"{path}: not found; peers are measured from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _convert_tensorwise_fast(model: GPT) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    fast = {
        name: replace(getattr(config, name), use_fast_accum=True) for name in (f"gemm_config_{gemm}" for gemm in GEMMS)
    }
    config = replace(config, emulate=not fp8_tensor_cores(), **fast)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name.startswith("blocks."))
