"""A run under the trainer's own loop that takes turns with something else, in the same process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8lab import records
from fp8lab.config import RunConfig, validate
from fp8lab.data import Loader
from fp8lab.training import trainer
from fp8lab.training.session import Session


class Enough(Exception):
    """All rounds are measured; the rest of the run is of no interest."""


class PacedSession(Session):
    """A session under the trainer's own loop that takes turns with something else, and times what it can."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.turns: Iterator[int] = iter(())
        """Runs between the session's steps: yields how many of them come next, and ends the run where it ends."""
        self._turn_ends = 0
        self.validation_seconds: list[float] = []
        self.health_seconds: list[float] = []
        self.save_seconds: list[float] = []
        """What each save kept the loop from the next step."""
        self._save_began: float | None = None

    def take_step(self, batch: Tensor) -> None:
        if self._save_began is not None:
            self.save_seconds.append(time.perf_counter() - self._save_began)
            self._save_began = None
        if self.step == self._turn_ends:
            steps = next(self.turns, None)
            if steps is None:
                raise Enough
            self._turn_ends += steps
        super().take_step(batch)

    def validate(self) -> None:
        began = self.now()
        super().validate()
        self.validation_seconds.append(self.now() - began)

    def _measure_health(self, batch: Tensor, gradient_norms: Tensor) -> None:
        if not self.config.health_interval or (self.step + 1) % self.config.health_interval:
            return
        began = self.now()
        super()._measure_health(batch, gradient_norms)
        self.health_seconds.append(self.now() - began)

    def state(self) -> Any:
        # Waits for the steps under way: those are not the save's time.
        self._save_began = self.now()
        return super().state()

    def now(self) -> float:
        """Seconds, when the device has done all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def shortened(config: RunConfig, steps: int, **changes: Any) -> RunConfig:
    """`config` for `steps` steps of one micro-batch, with no validation or checkpoint that is not asked for."""
    values = config.model_dump(mode="json") | {
        "plan": records.BENCHMARK_PLAN,
        "tokens": steps * tokens_a_step(config),
        "global_batch_tokens": tokens_a_step(config),
        "validation_interval": 0,
        "health_interval": 0,
        "checkpoint_interval": 10 * steps,
        "keep_checkpoints_at": [],
        "compact": False,
        "parent": None,
        "evaluation": "none",
    }
    return validate(RunConfig, values | changes, f"{config.plan}/{config.run}")


def tokens_a_step(config: RunConfig) -> int:
    return config.micro_batch * config.model.seq_len


def paced(config: RunConfig, data_dir: Path, scratch: Path) -> tuple[PacedSession, trainer.Training, Loader]:
    """A run that stands at its beginning, as `trainer.train` would drive it."""
    # The bare step's model and a recompilation for validation must not run into dynamo's limit.
    torch._dynamo.config.recompile_limit = 64
    dataset, loader = trainer.open_data(config, data_dir)
    folder = scratch / "checkpoints"
    folder.mkdir(parents=True)
    session = PacedSession(config, dataset, folder)
    return session, trainer.Training(session, loader, scratch / "records", None), loader


def drive(training: trainer.Training, session: PacedSession, turns: Iterable[int]) -> None:
    """Train until `turns` ends."""
    session.turns = iter(turns)
    try:
        training.run()
    except Enough:
        return
    raise RuntimeError("the run ended before its last round")
