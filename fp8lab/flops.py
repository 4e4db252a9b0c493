"""Parameters and FLOPs, each convention under a name of its own.

Papers disagree on what N is and on whether attention, the head and the embedding count, and the
disagreement moves scaling-law exponents (Porian et al., 2406.19146). So every convention is a
column, and figures say which one they use.

A matrix product of an (m, k) by a (k, n) matrix is 2 m k n FLOPs; training costs three of them a
Linear (forward, gradient of the input, gradient of the weight): 6 FLOPs a weight and token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fp8lab.config import Head, ModelConfig, Recipe, parameter_count

BF16_PEAK_FLOPS = 989.4e12
"""Dense BF16 FLOP/s of an H100 SXM or H200 (NVIDIA's data sheets): the denominator of 'BF16-MFU', also for FP8 runs."""
FP8_OUTPUT_GRADIENT_FROM = 1024
"""Width from which `fused` computes the weight gradient of attention's output projection in FP8: below, its transposed
copy costs more than the GEMM gains (`fp8lab.config.FusedConfig`)."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by convention."""

    total: int
    """Every trained number, the tied embedding once: our N."""
    non_embedding: int
    """Without the embedding (Kaplan et al., 2001.08361)."""
    matmul: int
    """Weights that a GEMM multiplies a token by: the blocks' Linears and the head (the tied embedding as a matrix)."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs a token by convention."""

    per_token_6n: int
    """6 N."""
    per_token_matmul_attention: int
    """6 N_matmul + 12 L d T: attention scores as if every token attended to all T (PaLM, 2204.02311, appendix B)."""
    per_token_matmul_attention_causal: int
    """6 N_matmul + 6 L d T: a causal mask halves the attention. Totals and MFU use this one."""


def parameters(model: ModelConfig) -> Parameters:
    """Parameter counts of `model` in every convention."""
    total = parameter_count(model)
    embedding = model.vocab_size * model.d_model
    return Parameters(
        total=total,
        non_embedding=total - embedding,
        matmul=sum(linear_weights(model).values()),
    )


def linear_weights(model: ModelConfig) -> dict[str, int]:
    """Weights that GEMMs use, by kind of layer, summed over blocks: qkv, output, gate_up, down, head."""
    d, ff, layers = model.d_model, model.d_ff, model.n_layers
    return {
        "qkv": layers * 3 * d * d,
        "output": layers * d * d,
        "gate_up": layers * 2 * d * ff,
        "down": layers * d * ff,
        "head": model.vocab_size * d,
    }


def flops_per_token(model: ModelConfig) -> FlopsPerToken:
    """Training FLOPs a token of `model` in every convention."""
    counts = parameters(model)
    attention = model.n_layers * model.d_model * model.seq_len
    return FlopsPerToken(
        per_token_6n=6 * counts.total,
        per_token_matmul_attention=6 * counts.matmul + 12 * attention,
        per_token_matmul_attention_causal=6 * counts.matmul + 6 * attention,
    )


def flops_record(model: ModelConfig, tokens: int) -> dict[str, int]:
    """The `flops` field of a run record: every convention, and the total over `tokens`."""
    per_token = flops_per_token(model)
    return asdict(per_token) | {"total": per_token.per_token_matmul_attention_causal * tokens}


def fp8_share(model: ModelConfig, recipe: Recipe, head: Head) -> float:
    """Share of the linear layers' GEMM FLOPs that runs in FP8, where no layer is excluded by name or shape.

    Each Linear has three GEMMs of equal FLOPs (forward, and the gradients of input and weight). ``rowwise_with_gw_hp``
    keeps the weight gradient's in BF16, ``fused`` that of attention's output projection below a width.
    """
    weights = linear_weights(model)
    gemms = dict.fromkeys(weights, {"bf16": 0, "rowwise_with_gw_hp": 2}.get(recipe, 3))
    if recipe == "fused" and model.d_model < FP8_OUTPUT_GRADIENT_FROM:
        gemms["output"] = 2
    gemms["head"] = 3 if head == "fp8" else 0
    return sum(gemms[layer] * weight for layer, weight in weights.items()) / (3 * sum(weights.values()))


def bf16_mfu(model: ModelConfig, tokens_per_second: float, device_count: int = 1) -> float:
    """Model FLOPs utilisation against BF16's peak (Chowdhery et al., 2204.02311), whatever the recipe."""
    per_token = flops_per_token(model).per_token_matmul_attention_causal
    return per_token * tokens_per_second / (BF16_PEAK_FLOPS * device_count)
