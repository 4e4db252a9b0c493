"""What saving a checkpoint in the background costs a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8lab.benchmark.paced import PacedSession, drive, paced, shortened
from fp8lab.config import RunConfig
from fp8lab.measurement import summary
from fp8lab.training.checkpoint import CheckpointWriter

SAVE_EVERY = 500
"""Steps between checkpoints that the cost of one is spread over."""


@dataclass
class _CheckpointTurns:
    """Turns with a checkpoint near their beginning and turns without; one figure of each a round."""

    session: PacedSession
    writer: CheckpointWriter
    rounds: int
    steps: int
    """Steps a turn; the session saves every two turns."""
    seconds_with: list[float] = field(default_factory=list)
    """A step."""
    seconds_without: list[float] = field(default_factory=list)
    """A step."""
    write_seconds: list[float] = field(default_factory=list)
    """Of each write, in the background."""

    def __iter__(self) -> Iterator[int]:
        # The trainer saves after its step: a turn that begins one step earlier has the save in it.
        yield 2 * self.steps - 1
        for _ in range(self.rounds):
            yield from self._turn(self.seconds_with)
            self.write_seconds.append(self.writer.write_seconds)
            yield from self._turn(self.seconds_without)

    def _turn(self, seconds: list[float]) -> Iterator[int]:
        began = self.session.now()
        yield self.steps
        seconds.append((self.session.now() - began) / self.steps)
        self.writer.wait()


def measure_checkpoint(
    config: RunConfig, *, data_dir: Path, scratch: Path, rounds: int, steps_per_round: int
) -> dict[str, Any]:
    """Rounds of training with one checkpoint near their beginning and without in turns.

    A round must outlast the write in the background, or what that costs is not all in it.

    Returns:
        seconds a step in both, seconds lost to a save and their share of `SAVE_EVERY` steps, seconds that a save
        kept the loop from its next step, seconds of the write in the background, and a checkpoint's bytes.
    """
    steps = steps_per_round * (2 * rounds + 2) + 1
    session, training, _ = paced(shortened(config, steps, checkpoint_interval=2 * steps_per_round), data_dir, scratch)
    writer = training.writer
    assert writer is not None, "a process alone writes its checkpoints"
    turns = _CheckpointTurns(session, writer, rounds, steps_per_round)
    drive(training, session, turns)
    newest = max(session.folder.glob("step-*"))
    return {"checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir())} | _checkpoint_cost(turns)


def _checkpoint_cost(turns: _CheckpointTurns) -> dict[str, Any]:
    pairs = zip(turns.seconds_with, turns.seconds_without, strict=True)
    lost = [(with_save - without) * turns.steps for with_save, without in pairs]
    step_seconds = statistics.median(turns.seconds_without)
    stalls = turns.session.save_seconds
    return {
        "steps_per_round": turns.steps,
        "save_every": SAVE_EVERY,
        "step_seconds": summary(turns.seconds_without),
        "step_seconds_with_a_save": summary(turns.seconds_with),
        "lost_seconds": summary(lost),
        "cost": summary([loss / (SAVE_EVERY * step_seconds) for loss in lost]),
        # The first save page-locks its memory.
        "first_stall_seconds": stalls[0],
        "stall_seconds": summary(stalls[1:] or stalls),
        "write_seconds": summary(turns.write_seconds),
        "write_outlasted_a_round": max(turns.write_seconds) > turns.steps * step_seconds,
    }
