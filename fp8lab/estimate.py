"""What a run will cost, before it runs: memory and hours.

Estimates, never results: they are printed by ``fp8lab run --dry-run`` and labelled as planned
wherever the article shows them.
"""

from __future__ import annotations

from fp8lab.config import RunConfig, parameter_count
from fp8lab.flops import BF16_PEAK_FLOPS, flops_per_token

# FP32 weight, gradient and AdamW's two moments, and the BF16 copy that autocast multiplies with.
STATE_BYTES_PER_PARAMETER = 4 + 4 + 8 + 2
# BF16 logits and their gradient. The loss takes tokens in chunks of at most so many logits.
LOGIT_BYTES = 2 + 2
CHUNK_LOGITS = 2**30
# What else a step holds at the peak, as a factor on what it computes; the state is exact. With it the estimate meets
# the peaks measured on an H200 and an H100 from 48M to 1.5B to 7%.
OTHER = 1.11


def memory_bytes(config: RunConfig) -> int:
    """Estimated peak bytes on one GPU, in BF16 and without sharding.

    State, plus what a compiled block keeps for backward: about six vectors of d_model and three of
    d_ff a token, in BF16, plus a chunk of logits. FP8 recipes keep less; activation checkpointing keeps
    one vector of d_model a block and token.
    """
    model = config.model
    tokens = config.micro_batch * model.seq_len
    kept = model.d_model if config.activation_checkpointing else 6 * model.d_model + 3 * model.d_ff
    activations = tokens * model.n_layers * kept * 2
    logits = min(tokens * model.vocab_size, CHUNK_LOGITS) * LOGIT_BYTES
    return int(parameter_count(model) * STATE_BYTES_PER_PARAMETER + (activations + logits) * OTHER)


SCALING_EFFICIENCY = 0.9
"""Assumed tokens/s of several GPUs over that many times one GPU's."""


def hours(config: RunConfig, bf16_mfu: float, device_count: int) -> float:
    """Estimated hours on `device_count` H100s; of a decay branch its own steps alone.

    Args:
        bf16_mfu: assumed utilisation of one GPU's BF16 peak.
    """
    tokens = config.own_steps * config.global_batch_tokens
    flops = flops_per_token(config.model).per_token_matmul_attention_causal * tokens
    scaling = SCALING_EFFICIENCY if device_count > 1 else 1.0
    return flops / (BF16_PEAK_FLOPS * bf16_mfu * device_count * scaling) / 3600
