"""The training worker, on tokens made by a rule: ``python -m tests.faults.worker CONFIG.json ...``.

A test that breaks a run at a moment of its choice has the worker wait there (`wait_at`): no clock decides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# A run imports this for its first tensor without data: once here, not in every fork.
import torch._dynamo

from fp8lab import records
from fp8lab.training import checkpoint, session, trainer
from fp8lab.training.guard import StepGuard
from tests import rule_data
from tests.forks import errors_to

OUT_OF_MEMORY = "OUT_OF_MEMORY"
"""Variable of the environment: 'R,S' lets rank R run out of memory in its step S."""


class Moment(StrEnum):
    """Where a worker can be made to wait."""

    STARTING = "at its start, with what it resumes from loaded"
    STEPPING = "between the gradients of a step and the update"
    RECORDING = "between two tables of its record"
    RECORDED = "with record.json written"
    WRITING = "inside the writing of a checkpoint"
    WRITTEN = "with a checkpoint written and older ones not yet removed"
    FINISHING = "before it writes the final weights"


def wait_at(moment: Moment, step: int, gate: Connection) -> None:
    """Let this process say through `gate` that it has come to `moment` of `step`, and go on when it is answered."""

    def reached(now: int) -> None:
        if now == step:
            gate.send(None)
            gate.recv()

    def before(owner: Any, name: str, step_of: Callable[..., int]) -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *arguments: (reached(step_of(*arguments)), real(*arguments))[1])

    def after(owner: Any, name: str, step_of: Callable[..., int]) -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *arguments: (real(*arguments), reached(step_of(*arguments)))[0])

    match moment:
        case Moment.STARTING:
            after(session.Session, "resume", lambda _: step)
        case Moment.STEPPING:
            before(StepGuard, "judge", lambda _, done, *verdict: done + 1)
        case Moment.RECORDING:
            after(records, "write_table", lambda _, name, rows: rows["step"].max() if name == "metrics" else -1)
        case Moment.RECORDED:
            after(records, "write", lambda record, _: record.steps)
        case Moment.WRITING:
            before(checkpoint, "_write_history", lambda _, history: history.step)
        case Moment.WRITTEN:
            after(checkpoint, "write", lambda _, state, *world: state.step)
        case Moment.FINISHING:
            before(checkpoint, "save_final", lambda *_: step)


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
    """`fp8lab.training.trainer.main` on the rule's tokens."""
    trainer.open_data = rule_data.open_data
    rank, _, step = os.environ.get(OUT_OF_MEMORY, ",").partition(",")
    if rank and rank == os.environ.get("RANK"):
        run_out_of_memory(int(step))
    return trainer.main(arguments)


def forked(arguments: list[str], errors: Path, wait: tuple[Moment, int, Connection] | None) -> None:
    """`main` in a process forked from one that has imported everything; standard error goes to a file."""
    errors_to(errors)
    if wait is not None:
        wait_at(*wait)
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
