"""What a run in progress tells the outside: one small JSON file, replaced at most once a second.

``fp8lab run`` draws its bars from it and ``fp8lab status`` reads it from another terminal. It is
news, not a result: nothing is computed from it, and losing it loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE_NAME = "progress.json"
LOCK_FILE_NAME = ".lock"
"""Held in a run's folder by the process that trains it (`fp8lab.training.checkpoint.lock`)."""
WRITE_INTERVAL_SECONDS = 1.0
SILENT_SECONDS = 600.0
"""Without news for so long, a run on another machine may be dead: compiling and validating take minutes, not more."""


class Progress(BaseModel):
    """One moment of a run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    stage: Literal["starting", "training", "validating", "saving", "evaluating", "timing", "done"]
    step: int = 0
    """Steps done: optimizer steps, items when evaluating, cases when timing."""
    steps: int
    """Steps in all."""
    tokens: int = 0
    """Training tokens seen."""
    loss: float | None = None
    """Last logged training loss, nats a token."""
    tokens_per_second: float | None = None
    bf16_mfu: float | None = None
    """Against BF16's peak; None off the GPU."""
    eta_seconds: float | None = None
    updated_utc: datetime = Field(default_factory=lambda: datetime.now(UTC))
    pid: int = Field(default_factory=os.getpid)
    """The process that does the work: where signals go."""
    host: str = Field(default_factory=socket.gethostname)
    """The machine that `pid` is a process of. News from before this was written counts as this machine's."""

    def is_here(self) -> bool:
        """True if this machine wrote it."""
        return self.host == socket.gethostname()

    def age_seconds(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        return max(0.0, (datetime.now(UTC) - self.updated_utc).total_seconds())

    def is_alive(self) -> bool:
        """True if there is a process of that number on this machine: perhaps another one by now."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def summary(self) -> str:
        """One line: stage, step, loss, speed, utilisation, time left."""
        parts = [f"{self.stage} {self.step}/{self.steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.bf16_mfu is not None:
            parts.append(f"BF16-MFU {self.bf16_mfu:.1%}")
        if self.eta_seconds is not None:
            parts.append(f"ETA {clock(self.eta_seconds)}")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class ProgressFile:
    """Writes `Progress` into a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._next_write = 0.0

    def update(self, make: Callable[[], Progress], *, now: bool = False) -> None:
        """Write ``make()`` if a second has passed since the last write, or if `now`; a full disk loses it, no more."""
        if not now and time.monotonic() < self._next_write:
            return
        self._next_write = time.monotonic() + WRITE_INTERVAL_SECONDS
        temporary = self._path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
        text = make().model_dump_json()
        with contextlib.suppress(OSError):
            temporary.write_text(text)
            temporary.replace(self._path)


def is_locked(folder: Path) -> bool:
    """True while a process trains the run in `folder`."""
    try:
        with (folder / LOCK_FILE_NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def read_progress(path: Path) -> Progress | None:
    """The last `Progress` in the file `path`, or None where there is none that can be read."""
    try:
        return Progress.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
