"""The training worker, on tokens made by a rule: ``python -m tests.faults.worker CONFIG.json ...``."""

import os
import sys
from pathlib import Path

import torch

# A run imports this for its first tensor without data: once here, not in every fork.
import torch._dynamo

from fp8lab import session, trainer
from tests import rule_data

OUT_OF_MEMORY = "OUT_OF_MEMORY"
"""Variable of the environment: 'R,S' lets rank R run out of memory in its step S."""


def run_out_of_memory(step: int) -> None:
    """Let an allocation of this process fail in a step."""
    real, calls = session.training_loss, []

    def training_loss(*arguments):
        calls.append(1)
        if len(calls) == step:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    session.training_loss = training_loss


def main(arguments: list[str]) -> int:
    """`fp8lab.trainer.main` on the rule's tokens."""
    trainer.open_data = rule_data.open_data
    rank, _, step = os.environ.get(OUT_OF_MEMORY, ",").partition(",")
    if rank and rank == os.environ.get("RANK"):
        run_out_of_memory(int(step))
    return trainer.main(arguments)


def forked(arguments: list[str], errors: Path) -> None:
    """`main` in a process forked from one that has imported everything; standard error goes to a file."""
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
