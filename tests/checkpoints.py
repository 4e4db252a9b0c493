"""Looking into a checkpoint of one process: its tensors whole, as their files hold them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file

from fp8lab import checkpoint
from fp8lab.checkpoint import PARTS, TrainingState


def load_latest(folder: Path) -> TrainingState | None:
    """The newest whole checkpoint in a run's folder, or None where there is none."""
    path = checkpoint.latest(folder)
    return None if path is None else _load(path)


def load_step(folder: Path, step: int) -> TrainingState:
    """The checkpoint after `step` steps."""
    return _load(checkpoint.at_step(folder, step))


def _load(path: Path) -> TrainingState:
    history = checkpoint.load_history(path)
    values = {field.name: getattr(history, field.name) for field in fields(history)}
    return TrainingState(**values, **{part: load_file(path / f"{part}.safetensors") for part in PARTS})
