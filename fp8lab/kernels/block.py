"""The block of `fp8lab.model`, its forward and backward written out by hand around FP8 tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.config import Fp8Format, FusedConfig
from fp8lab.kernels import attention
from fp8lab.kernels.operations import bf16_grad_weight, operations
from fp8lab.kernels.scaling import Fp8State, Slot
from fp8lab.model import Block

WEIGHTS = ("qkv", "output", "gate_up", "down")
INPUTS = ("attention_input", "attended", "mlp_input", "activated")
GRADIENTS = ("grad_qkv", "grad_attention", "grad_gate_up", "grad_mlp")
SLOTS = WEIGHTS + INPUTS + GRADIENTS
"""The quantised tensors of a block: operands of its twelve GEMMs."""
SLOT_ROLES = tuple(
    (linear, tensor)
    for tensor in ("weight", "input", "grad_output")
    for linear in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
)
"""The Linear that each of `SLOTS` belongs to, and what it is there."""


def slot_formats(settings: FusedConfig) -> list[Fp8Format]:
    """Format of each of a block's `SLOTS`."""
    return [settings.gradient_format if name in GRADIENTS else "e4m3" for name in SLOTS]


@dataclass
class _QuantisedWeight:
    """FP8 copies of a weight, made once a step."""

    forward: Tensor
    """(out, in), for the forward GEMM."""
    backward: Tensor
    """(in, out), for the gradient of the input."""
    made_of: tuple[int, int]
    """Storage and version of the weight that they are copies of.

    Not its address: FSDP frees a gathered weight's memory and gathers it again elsewhere, into the same storage. It
    does so without a new version, even after a step of the optimizer: `FusedBlock.end_step` is what counts then.
    """


@dataclass
class _QuantisedGradient:
    """FP8 copies of the gradient of a block's output, made by the block above while it had that gradient in hand."""

    grad: Tensor
    """What they are copies of, kept so that its address is nobody else's."""
    version: int
    """Of `grad`."""
    rows: Tensor
    transposed: Tensor


class FusedBlock(nn.Module):
    """A `Block` whose GEMMs run in FP8: the same parameters, under the same names."""

    def __init__(self, block: Block, state: Fp8State, first_slot: int, *, emulate: bool) -> None:
        """
        Args:
            block: the block to take the parameters of.
            state: scales and histories of all blocks.
            first_slot: the first of this block's slots in `state`.
            emulate: compute by the plain-PyTorch reference.
        """
        super().__init__()
        self.attention_norm = block.attention_norm
        self.attention = block.attention
        self.mlp_norm = block.mlp_norm
        self.mlp = block.mlp
        self.operations = operations(emulate)
        self._first_slot = first_slot
        self._quantised: dict[str, _QuantisedWeight] = {}
        self._handed_down: _QuantisedGradient | None = None
        self._below: tuple[FusedBlock, ...] = ()
        # Not a submodule: the model owns the state, or a checkpoint would hold it once a block.
        self._state = (state,)

    @property
    def state(self) -> Fp8State:
        return self._state[0]

    def slots(self, *, record: bool) -> list[Slot]:
        """This block's `SLOTS` (see `Fp8State.slots`)."""
        return self.state.slots(self._first_slot, len(SLOTS), record=record)

    def compile(self, *_: Any, **__: Any) -> None:
        """Nothing: the kernels are compiled already, and torch.compile cannot see into them."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The residual stream after the block: (batch, seq, d_model) BF16 of `x` (batch, seq, d_model)."""
        recording = torch.is_grad_enabled()
        slots = self.slots(record=recording)
        # Everything below names its dtypes; autocast would change the emulated products.
        with torch.autocast(x.device.type, enabled=False):
            out = _FusedBlock.apply(
                x.bfloat16(),
                cos,
                sin,
                self.attention_norm.weight,
                self.attention.q_norm.weight,
                self.attention.k_norm.weight,
                self.mlp_norm.weight,
                self.attention.qkv.weight,
                self.attention.output.weight,
                self.mlp.gate_up.weight,
                self.mlp.down.weight,
                self,
                dict(zip(SLOTS, slots, strict=True)),
            )
        if not recording:
            # The weights' copies were cast without recording an amax; training, finding them, would record none either.
            self._quantised.clear()
        return out.to(x.dtype)

    def quantised_weight(self, name: str, weight: Tensor, slot: Slot) -> _QuantisedWeight:
        """FP8 copies of `weight`, cast again only after it has changed."""
        cached = self._quantised.get(name)
        made_of = (weight.untyped_storage()._cdata, weight._version)
        if cached is None or cached.made_of != made_of:
            forward, backward = self.state.quantise(slot, self.operations.quantise_both, weight.detach(), slot)
            cached = self._quantised[name] = _QuantisedWeight(forward, backward, made_of)
        return cached

    def end_step(self) -> None:
        """Drop the weights' FP8 copies: their scales are about to change."""
        self._quantised.clear()
        self._handed_down = None

    def stack_on(self, below: FusedBlock) -> None:
        """Let this block quantise the gradient that `below`, whose output it reads, begins its backward with."""
        self._below = (below,)

    @property
    def slot_below(self) -> Slot | None:
        """Slot by which the block below quantises this block's gradient of x; None where there is no such block."""
        if not self._below:
            return None
        (below,) = self._below
        return below.state.slots(below._first_slot + SLOTS.index("grad_mlp"), 1, record=True)[0]

    def hand_down(self, grad: Tensor, rows: Tensor, transposed: Tensor) -> None:
        """Keep the FP8 copies of `grad`, the gradient of this block's x, for the block below."""
        (below,) = self._below
        below._handed_down = _QuantisedGradient(grad, grad._version, rows, transposed)

    def quantised_gradient(self, grad: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
        """FP8 copies of `grad`, the gradient of this block's output: those handed down, if they are of this tensor."""
        handed_down, self._handed_down = self._handed_down, None
        if (
            handed_down is not None
            and (handed_down.grad.data_ptr(), handed_down.grad.numel()) == (grad.data_ptr(), grad.numel())
            and handed_down.version == grad._version
        ):
            return handed_down.rows, handed_down.transposed
        return self.state.quantise(slot, self.operations.quantise_both, grad, slot)


class _FusedBlock(torch.autograd.Function):
    """Saved for backward, in BF16: the residual stream at both norms, qkv, attention's output and gate_up.

    Whatever FP8 tensor backward needs is made again from those, transposed, by a kernel that reads them there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_gain: Tensor,
        q_gain: Tensor,
        k_gain: Tensor,
        mlp_gain: Tensor,
        qkv_weight: Tensor,
        output_weight: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        block: FusedBlock,
        slots: dict[str, Slot],
    ) -> Tensor:
        operations, quantise, settings = block.operations, block.state.quantise, block.state.settings
        fast = "output" in settings.fast_accumulation
        shape = x.shape
        x = x.contiguous().flatten(0, 1)

        def linear(inputs: Tensor, input_name: str, weight_name: str, weight: Tensor) -> Tensor:
            slot = slots[weight_name]
            quantised = block.quantised_weight(weight_name, weight, slot)
            return operations.matmul(inputs, quantised.forward, slots[input_name], slot, torch.bfloat16, fast)

        slot = slots["attention_input"]
        epsilon = block.attention_norm.epsilon
        _, attention_rstd, normed = quantise(slot, operations.rms_norm, x, None, attention_gain, epsilon, slot)
        qkv = linear(normed, "attention_input", "qkv", qkv_weight)
        del normed
        q, k, v = _rotated(block, qkv, q_gain, k_gain, cos, sin, shape)
        attended, attention_saved = attention.forward(q, k, v)
        attended = attended.transpose(1, 2).reshape(x.shape)
        slot = slots["attended"]
        projected = linear(quantise(slot, operations.quantise, attended, slot), "attended", "output", output_weight)

        slot = slots["mlp_input"]
        epsilon = block.mlp_norm.epsilon
        middle, mlp_rstd, normed = quantise(slot, operations.rms_norm, x, projected, mlp_gain, epsilon, slot)
        del projected
        gate_up = linear(normed, "mlp_input", "gate_up", gate_up_weight)
        del normed
        slot = slots["activated"]
        activated = quantise(slot, operations.swiglu, gate_up, slot)
        out = linear(activated, "activated", "down", down_weight)
        out += middle

        keep_rotated = x.shape[1] < settings.recompute_rotated_from
        ctx.save_for_backward(
            x, attention_rstd, qkv, attended, attention_saved.logsumexp, middle, mlp_rstd, gate_up,
            cos, sin, attention_gain, q_gain, k_gain, mlp_gain,
            qkv_weight, output_weight, gate_up_weight, down_weight,
            *((q, k) if keep_rotated else ()),
        )  # fmt: skip
        ctx.block, ctx.slots, ctx.shape = block, slots, shape
        ctx.attention_saved = attention_saved._replace(logsumexp=torch.empty(0))
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, attention_rstd, qkv, attended, logsumexp, middle, mlp_rstd, gate_up,
            cos, sin, attention_gain, q_gain, k_gain, mlp_gain,
            qkv_weight, output_weight, gate_up_weight, down_weight, *rotated,
        ) = ctx.saved_tensors  # fmt: skip
        block, slots, shape = ctx.block, ctx.slots, ctx.shape
        operations, quantise, settings = block.operations, block.state.quantise, block.state.settings

        def grad_input(grad: Tensor, grad_name: str, weight_name: str, weight: Tensor) -> Tensor:
            slot = slots[weight_name]
            quantised = block.quantised_weight(weight_name, weight, slot)
            fast = "grad_input" in settings.fast_accumulation
            return operations.matmul(grad, quantised.backward, slots[grad_name], slot, torch.bfloat16, fast)

        def grad_weight(grad_t: Tensor, grad_name: str, inputs_t: Tensor, input_name: str) -> Tensor:
            fast = "grad_weight" in settings.fast_accumulation
            return operations.matmul(grad_t, inputs_t, slots[grad_name], slots[input_name], torch.float32, fast)

        # MLP
        grad = grad_out.contiguous().view(x.shape)
        grad_mlp, grad_mlp_t = block.quantised_gradient(grad, slots["grad_mlp"])
        grad_activated = grad_input(grad_mlp, "grad_mlp", "down", down_weight)
        slot = slots["grad_gate_up"]
        grad_gate_up, grad_gate_up_t, activated_t, dot = quantise(
            slot, operations.swiglu_backward, gate_up, grad_activated, slots["activated"], slot
        )
        del grad_activated
        grad_down_weight = grad_weight(grad_mlp_t, "grad_mlp", activated_t, "activated")
        del grad_mlp, grad_mlp_t, activated_t
        grad_normed = grad_input(grad_gate_up, "grad_gate_up", "gate_up", gate_up_weight)
        del grad_gate_up
        slot = slots["grad_attention"]
        output_gradient_in_fp8 = x.shape[1] >= settings.bf16_output_gradient_below
        grad, grad_mlp_gain, normed_t, grad_attention, grad_attention_t = quantise(
            slot, operations.rms_norm_backward, grad_normed, middle, mlp_rstd, mlp_gain, dot, grad,
            slots["mlp_input"], slot, output_gradient_in_fp8,
        )  # fmt: skip
        del grad_normed
        grad_gate_up_weight = grad_weight(grad_gate_up_t, "grad_gate_up", normed_t, "mlp_input")
        del grad_gate_up_t, normed_t

        # Attention
        if output_gradient_in_fp8:
            attended_t = operations.quantise_transposed(attended, slots["attended"])
            grad_output_weight = grad_weight(grad_attention_t, "grad_attention", attended_t, "attended")
            del attended_t
        else:
            grad_output_weight = bf16_grad_weight(grad, attended)
        grad_attended = grad_input(grad_attention, "grad_attention", "output", output_weight)
        del grad_attention, grad_attention_t
        q, k, v = _rotated(block, qkv, q_gain, k_gain, cos, sin, shape, rotated)
        grads = attention.backward(
            _as_heads(grad_attended, shape, q.shape[1]), q, k, v, _as_heads(attended, shape, q.shape[1]),
            ctx.attention_saved._replace(logsumexp=logsumexp),
        )  # fmt: skip
        del grad_attended, q, k, v, rotated
        slot = slots["grad_qkv"]
        epsilon = block.attention.q_norm.epsilon
        grad_qkv, grad_qkv_t, grad_q_gain, grad_k_gain, dot = quantise(
            slot, operations.norm_rotate_backward, qkv, grads, q_gain, k_gain, cos, sin, epsilon, slot
        )
        del grads
        grad_normed = grad_input(grad_qkv, "grad_qkv", "qkv", qkv_weight)
        del grad_qkv
        arguments = (grad_normed, x, attention_rstd, attention_gain, dot, grad, slots["attention_input"])
        slot_below = block.slot_below
        if slot_below is None:
            grad, grad_attention_gain, normed_t, *_ = operations.rms_norm_backward(*arguments, None, False)
        else:
            grad, grad_attention_gain, normed_t, rows, transposed = quantise(
                slot_below, operations.rms_norm_backward, *arguments, slot_below, True
            )
            block.hand_down(grad, rows, transposed)
        grad_qkv_weight = grad_weight(grad_qkv_t, "grad_qkv", normed_t, "attention_input")
        del grad_qkv_t, normed_t
        return (
            grad.view(shape), None, None, grad_attention_gain, grad_q_gain, grad_k_gain, grad_mlp_gain,
            grad_qkv_weight, grad_output_weight, grad_gate_up_weight, grad_down_weight, None, None,
        )  # fmt: skip


def _as_heads(x: Tensor, shape: torch.Size, n_heads: int) -> Tensor:
    """(rows, d_model) as (batch, heads, seq, head_dim)."""
    return x.view(*shape[:2], n_heads, -1).transpose(1, 2)


def _rotated(
    block: FusedBlock,
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: torch.Size,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention reads them, (batch, heads, seq, head_dim): `kept` q and k, or computed from qkv."""
    n_heads = block.attention.n_heads
    v = _as_heads(qkv[:, 2 * shape[2] :].unflatten(-1, (n_heads, -1)), shape, n_heads)
    if kept:
        return kept[0], kept[1], v
    epsilon = block.attention.q_norm.epsilon
    qk = block.operations.norm_rotate(qkv, q_gain, k_gain, cos, sin, n_heads, epsilon)
    q, k = qk.view(*shape[:2], 2, n_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v
