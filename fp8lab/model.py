"""The GPT: one model, no switches.

Pre-norm decoder with RMSNorm, RoPE, QK-norm, SwiGLU, no biases and a tied embedding, so that every
weight maps onto transformers' Qwen3 (`fp8lab.export`). One block::

    x (batch, seq, d_model)
    |-- attention_norm -> qkv -> q_norm, k_norm -> RoPE -> causal attention -> output --+
    +-----------------------------------------------------------------------------------+
    |-- mlp_norm -> gate_up -> silu(gate) * up -> down --+
    +-----------------------------------------------------+

The four Linears of a block (``qkv``, ``output``, ``gate_up``, ``down``) are what FP8 training
converts. q, k and v share one GEMM, and so do gate and up: fewer, larger GEMMs run nearer to the
tensor cores' peak, and each input is quantised once instead of two or three times.

Parameters are FP32 (the optimizer's master weights); the trainer runs the forward pass under BF16
autocast. Norm gains and RoPE are computed in FP32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8lab.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich, 1910.07467)."""

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(x.dtype)


def rope_frequencies(
    seq_len: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al., 2104.09864), FP32, each (seq_len, head_dim / 2)."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inverse)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension (the layout of Llama and Qwen3).

    Args:
        x: (batch, seq, heads, head_dim).
        cos, sin: (seq, head_dim / 2), FP32.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with RMSNorm on queries and keys (QK-norm: Dehghani et al., 2302.05442)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_epsilon)
        self.k_norm = RMSNorm(config.head_dim, config.norm_epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, d_model = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.n_heads, self.head_dim).unbind(2)
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        # scaled_dot_product_attention wants (batch, heads, seq, head_dim)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.output(attended.transpose(1, 2).reshape(batch, seq, d_model))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class TiedHead(nn.Module):
    """The output projection, through the embedding's weight; a module of its own so that its GEMM can be swapped."""

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits (..., vocab_size), in the dtype of `hidden` (..., d_model); `weight` is (vocab_size, d_model)."""
        return F.linear(hidden, weight.to(hidden.dtype))


class GPT(nn.Module):
    """The whole model: token ids in, logits out. The training loss is in `fp8lab.loss`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.head: nn.Module = TiedHead()
        self.checkpoint_activations = False
        """Recompute each block in backward instead of keeping its activations."""
        cos, sin = rope_frequencies(config.seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal(0, 2 / (5 d_model)) (SmallInit: 1910.05895), projections into the residual stream / sqrt(2 n_layers).

        The standard deviation is GPT-2's 0.02 at a width of 1,000; a fixed 0.02 would make the toy widths start
        so near zero that a run of a few hundred steps hardly leaves it.
        Drawn on the CPU in the order of `named_parameters`, so that a seed means the same weights
        on every device and in every recipe.
        """
        generator = torch.Generator().manual_seed(seed)
        deviation = math.sqrt(2 / (5 * self.config.d_model))
        residual_scale = 1 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            scale = residual_scale if name.endswith(("attention.output.weight", "mlp.down.weight")) else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (deviation * scale))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final normed activations (batch, seq, d_model) of token ids (batch, seq)."""
        seq = tokens.shape[1]
        cos, sin = self.cos[:seq], self.sin[:seq]
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream is BF16: it is read and written by every block.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., vocab_size) of `hidden` (..., d_model), through the tied embedding."""
        return self.head(hidden, self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seq, vocab_size) of token ids (batch, seq)."""
        return self.logits(self.hidden(tokens))
