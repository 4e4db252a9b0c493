"""What the trainer adds to the bare step: its loop with data and logging, validation, health."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp8lab.benchmark.paced import PacedSession, drive, paced, shortened, tokens_a_step
from fp8lab.config import RunConfig
from fp8lab.data import Loader
from fp8lab.measurement import summary
from fp8lab.model import GPT
from fp8lab.precision import convert
from fp8lab.speed.step import optimizer_step
from fp8lab.training.compilation import compile_blocks
from fp8lab.training.session import make_optimizer


class _BareStep:
    """`fp8lab.speed`'s step on a run's model, optimizer and batches, which are on the device already."""

    def __init__(self, session: PacedSession, loader: Loader, distinct_batches: int) -> None:
        config = session.config
        self._session = session
        self._model = GPT(config.model)
        self._model.initialise(config.seed)
        self._model.to(session.device)
        convert(self._model, config.recipe, config.head, config.high_precision, fused=config.fused)
        self._model.train()
        self._model.checkpoint_activations = config.activation_checkpointing
        if config.compile:
            compile_blocks(self._model, session.device)
        self._optimizer = make_optimizer(self._model, config)
        self._batches = [torch.from_numpy(loader.batch(step)).to(session.device) for step in range(distinct_batches)]

    def seconds(self, steps: int) -> float:
        """Time of `steps` steps."""
        began = self._session.now()
        for step in range(steps):
            optimizer_step(self._model, self._optimizer, self._batches[step % len(self._batches)])
        return self._session.now() - began


@dataclass
class _OverheadTurns:
    """The trainer and the bare step in turns, after a turn of each that compiles; one figure of each a round."""

    session: PacedSession
    bare: _BareStep
    rounds: int
    steps: int
    """Steps a turn."""
    bare_seconds: list[float] = field(default_factory=list)
    """A step."""
    trainer_seconds: list[float] = field(default_factory=list)
    """A step, without validation and health."""

    def __iter__(self) -> Iterator[int]:
        session = self.session
        yield self.steps
        self.bare.seconds(self.steps)
        for _ in range(self.rounds):
            self.bare_seconds.append(self.bare.seconds(self.steps) / self.steps)
            began = session.now()
            yield self.steps
            apart = session.validation_seconds[-1] + sum(session.health_seconds[-1:])
            self.trainer_seconds.append((session.now() - began - apart) / self.steps)


def measure_overhead(
    config: RunConfig, *, data_dir: Path, scratch: Path, rounds: int, steps_per_round: int
) -> dict[str, Any]:
    """Rounds of the trainer and of the bare step in turns; a round of the trainer has one validation and health probe.

    Data, logging, progress and event files are in the trainer's steps. Validation and health are timed apart, because
    the plan asks for them at intervals of its own.

    Returns:
        seconds a step of both (`trainer_step_seconds` without validation and health), `validation_seconds` and
        `health_seconds`, and round by round, as shares of the bare step: what the trainer adds to each step
        (`loop_share`), what validation and health add at the plan's intervals (None where it has none), and the sum.
    """
    intervals = {
        "validation_interval": steps_per_round,
        "health_interval": steps_per_round if config.health_interval else 0,
    }
    session, training, loader = paced(
        shortened(config, steps_per_round * (rounds + 1) + 1, **intervals), data_dir, scratch
    )
    bare = _BareStep(session, loader, distinct_batches=steps_per_round)
    turns = _OverheadTurns(session, bare, rounds, steps_per_round)
    drive(training, session, turns)
    return {"steps_per_round": steps_per_round} | _overhead(config, turns)


def _overhead(config: RunConfig, turns: _OverheadTurns) -> dict[str, Any]:
    """What the turns say of the run that the plan asks for, `config`."""
    ours, theirs = turns.trainer_seconds, turns.bare_seconds
    # The first of each compiles.
    validation_seconds, health_seconds = turns.session.validation_seconds[1:], turns.session.health_seconds[1:]
    micro_steps = config.global_batch_tokens / tokens_a_step(config)
    loop = [own / other - 1 for own, other in zip(ours, theirs, strict=True)]
    validation = _shares(validation_seconds, theirs, micro_steps * config.validation_interval)
    health = _shares(health_seconds, theirs, micro_steps * config.health_interval)
    parts = [part for part in (loop, validation, health) if part]
    return {
        "bare_step_seconds": summary(theirs),
        "trainer_step_seconds": summary(ours),
        "validation_seconds": summary(validation_seconds),
        "health_seconds": summary(health_seconds) if health else None,
        "loop_share": summary(loop),
        "validation_share": summary(validation) if validation else None,
        "health_share": summary(health) if health else None,
        "overhead": summary([sum(shares) for shares in zip(*parts, strict=True)]),
    }


def _shares(seconds: Sequence[float], step_seconds: Sequence[float], steps: float) -> list[float]:
    """What something that takes so long every so many steps adds to each; empty where it never happens."""
    if not steps:
        return []
    return [own / (steps * other) for own, other in zip(seconds, step_seconds, strict=True)]
