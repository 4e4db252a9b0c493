"""Whether this machine's Triton compiles the kernels as they are written.

Triton compiles each kernel anew on every machine, by whatever version is there, and has compiled transposed copies
wrong without a word: the forward pass is right, and so is the first loss. So before a model is trained, timed or
scored on a GPU, its kernels are held against their references there, NaN, infinities and saturation included.
"""

from __future__ import annotations

import functools

import torch
import triton

from fp8lab.config import ModelConfig
from fp8lab.kernels import problems
from fp8lab.kernels.problems import Problem

SEQUENCES, SEQ = 3, 80
"""Tokens of a check: more than a tile of rows, and multiples of none."""
BLOCKS = (
    problems.quantise, problems.quantise_both, problems.quantise_weight, problems.quantise_transposed,
    problems.rms_norm, problems.rms_norm_alone, problems.rms_norm_backward, problems.rms_norm_backward_rows_alone,
    problems.rms_norm_backward_of_the_first_block, problems.swiglu, problems.swiglu_backward, problems.norm_rotate,
    problems.norm_rotate_backward,
)  # fmt: skip
"""Calls that the blocks of `fused` make."""
FP8_HEAD = (
    problems.quantise, problems.quantise_embedding, problems.quantise_transposed, problems.cross_entropy_quantised,
)  # fmt: skip
"""Calls that an FP8 head makes."""
LOSS = (problems.cross_entropy, problems.cross_entropy_alone)
"""Calls that training and validation make on every GPU, with a BF16 head."""


class WrongKernel(RuntimeError):
    """A kernel computes something else than its reference: says which, and by which version of Triton."""


@functools.cache
def check_blocks(model: ModelConfig, device: torch.device) -> None:
    """Hold the kernels of `fused` against their references at the widths of `model`, once a process.

    It takes as long as compiling them, which training would take otherwise.

    Raises:
        WrongKernel: one of them is wrong.
    """
    _check(BLOCKS, model, device)


@functools.cache
def check_head(model: ModelConfig, device: torch.device) -> None:
    """`check_blocks` for the kernels of the FP8 head."""
    _check(FP8_HEAD, model, device)


@functools.cache
def check_loss(model: ModelConfig, device: torch.device) -> None:
    """`check_blocks` for the kernels of the loss."""
    _check(LOSS, model, device)


def _check(calls: tuple[problems.MakeCall, ...], model: ModelConfig, device: torch.device) -> None:
    for seed, make in enumerate(calls):
        for nasty in (False, True):
            # Of a seed of its own, lest memory of the call before holds what this one should write.
            problem = Problem(model, SEQUENCES, SEQ, device, seed=2 * seed + nasty, nasty=nasty)
            name, arguments = make(problem)
            wrong = problems.disagreement(name, arguments)
            if wrong is not None:
                raise WrongKernel(
                    f"Triton {triton.__version__} compiles the kernel {name} wrongly for this GPU: {wrong}; "
                    "use another version of Triton"
                )
