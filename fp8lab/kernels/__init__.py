"""The fused FP8 path: recipe ``fused``, and the output head with its loss.

Why fuse. On an H200 an FP8 GEMM takes little more than half the time of a BF16 one, and yet libraries that
swap each Linear by itself gain little or lose, because around every GEMM they read its operands again to
find their amax, to cast and to transpose them. An FP8 GEMM on Hopper reads both operands with the
contracted dimension contiguous, so that the three GEMMs of a Linear want each tensor in two layouts::

    output       (rows, out) = input    (rows, in)   x weight   (out, in)     contract in
    grad_input   (rows, in)  = grad     (rows, out)  x weight_t (in, out)     contract out
    grad_weight  (out, in)   = grad_t   (out, rows)  x input_t  (in, rows)    contract rows

Here the kernel that makes a tensor writes it in FP8 at once, scaled by the amax of earlier steps, and
gathers this step's (`fp8lab.kernels.scaling`). A transposed copy that only a weight gradient wants is written
in backward. The map, for one block; d = d_model, f = d_ff, 8 = FP8, 16 = BF16::

    kernel                  reads                              writes
    forward
    rms_norm                x 16                               normed 8 (rows, d), 1/rms
      GEMM qkv              normed, weight                     qkv 16 (rows, 3d)            kept
    norm_rotate             qkv                                q, k 16                      kept (or made again)
      attention             q, k, v in qkv                     attended 16 (rows, d)        kept
    quantise                attended                           attended 8 (rows, d)
      GEMM output           attended, weight                   projected 16 (rows, d)
    rms_norm                x, projected                       x + projected 16             kept
                                                               normed 8 (rows, d), 1/rms
      GEMM gate_up          normed, weight                     gate_up 16 (rows, 2f)        kept
    swiglu                  gate_up                            activated 8 (rows, f)
      GEMM down             activated, weight                  x 16 of the next block       kept
    backward
    quantise_both           grad of the last block's output    8 (rows, d) and (d, rows); lower blocks: from above
      GEMM down             grad 8, weight_t                   grad of activated 16 (rows, f)
    swiglu_backward         gate_up, grad of activated         8 (rows, 2f), (2f, rows); activated 8 (f, rows); dot
      GEMM down             the transposed pair                weight gradient FP32
      GEMM gate_up          grad 8, weight_t                   grad of normed 16 (rows, d)
    rms_norm_backward       grad of normed, x + projected,     grad of x + projected 16, 8 (rows, d) and (d, rows);
                            grad of x, 1/rms, dot              normed 8 (d, rows)
      GEMM gate_up          the transposed pair                weight gradient FP32
    quantise_transposed     attended 16                        8 (d, rows)
      GEMMs output          grad 8, and the transposed pair    grad of attended 16 (rows, d), weight gradient
      attention             grad of attended, q, k, v          grads of q, k, v 16
    norm_rotate_backward    those, qkv                         8 (rows, 3d) and (3d, rows); dot
      GEMM qkv              grad 8, weight_t                   grad of normed 16 (rows, d)
    rms_norm_backward       grad of normed, x,                 grad of x 16, 8 (rows, d) and (d, rows) for the block
                            grad of x + projected, 1/rms, dot  below; normed 8 (d, rows)
      GEMM qkv              the transposed pair                weight gradient FP32
    once a step
    quantise_both           each weight FP32                   8 (out, in) and (in, out)
    Fp8State.end_step       every amax                         every scale

``dot`` is each row's sum of a Linear's output times its gradient: what RMSNorm's backward would otherwise have to
sum over whole rows of the Linear's input (`fp8lab.kernels.reference.rms_norm_backward`).

All FP8 GEMMs of the blocks run with fast accumulation: partial sums stay in Hopper's tensor cores, which keep about 14
bits of them, instead of being added up in FP32 registers every so often (DeepSeek-V3, 2412.19437, section 3.3.2). The
error grows with the length of the sums, and those of a weight gradient are as long as the micro-batch has tokens.
torchao does so in the forward GEMM alone; `FusedConfig.fast_accumulation` chooses (``runs/plans/numerics-h200.yaml``
compares). The FP8 head's gradients are added up in FP32: their sums run over its vocabulary and over a chunk of
tokens. The reference accumulates in FP32: in this emulated runs are better than the recipe.

`fp8lab.kernels.reference` specifies each kernel in plain PyTorch, `fp8lab.kernels.triton_ops` implements it, and
where there are no FP8 tensor cores the blocks run on the reference: emulated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from fp8lab.config import FusedConfig
from fp8lab.errors import UserError
from fp8lab.kernels.block import SLOTS, WEIGHTS, FusedBlock, slot_formats
from fp8lab.kernels.head import Fp8TiedHead, linear_cross_entropy
from fp8lab.kernels.scaling import Fp8State
from fp8lab.model import GPT, Block

__all__ = [
    "Fp8State",
    "Fp8TiedHead",
    "FusedBlock",
    "convert_blocks",
    "end_step",
    "linear_cross_entropy",
]


def convert_blocks(
    model: GPT, *, emulate: bool, high_precision: Sequence[str] = (), settings: FusedConfig | None = None
) -> None:
    """Replace the blocks of `model` by `FusedBlock`s that share their parameters, under the same names.

    The scales become ``model.fp8_state``, part of the model's state_dict.

    Args:
        emulate: compute by the plain-PyTorch reference.
        high_precision: names of Linears to leave in BF16: all of a block's, or none.
        settings: of the recipe; the default ones if None.

    Raises:
        UserError: only some Linears of a block are to stay in BF16.
    """
    settings = settings or FusedConfig()
    fused = [index for index in range(len(model.blocks)) if not _stays_bf16(index, high_precision)]
    model.fp8_state = Fp8State(slot_formats(settings) * len(fused), settings).to(model.embedding.weight.device)
    for position, index in enumerate(fused):
        block = model.blocks[index]
        assert isinstance(block, Block), "converted already"
        model.blocks[index] = FusedBlock(block, model.fp8_state, position * len(SLOTS), emulate=emulate)
    for below, above in itertools.pairwise(model.blocks):
        if isinstance(below, FusedBlock) and isinstance(above, FusedBlock):
            above.stack_on(below)


def _stays_bf16(index: int, high_precision: Sequence[str]) -> bool:
    prefix = f"blocks.{index}."
    kept = [name for name in high_precision if name.startswith(prefix)]
    if 0 < len(kept) < len(WEIGHTS):
        raise UserError(
            f"recipe: fused converts whole blocks, but of block {index} only {', '.join(kept)} would stay in BF16; "
            f"accepted: all of a block's Linears ('{prefix}*') or none"
        )
    return bool(kept)


def end_step(model: GPT, skipped: Tensor, largest_of_ranks: Callable[[Tensor], object] | None = None) -> None:
    """Tell the fused blocks that an optimizer step has ended: once, however many micro-steps it had.

    Does nothing for a model of another recipe.

    Args:
        skipped: boolean scalar on the device: the optimizer left the weights as they were.
        largest_of_ranks: see `Fp8State.end_step`.
    """
    state = getattr(model, "fp8_state", None)
    if state is None:
        return
    for block in model.blocks:
        if isinstance(block, FusedBlock):
            block.end_step()
    state.end_step(skipped, largest_of_ranks)
