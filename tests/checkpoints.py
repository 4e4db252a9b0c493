"""Looking into a checkpoint of one process, its tensors whole as their files hold them, and tampering with one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file

from fp8lab.training import checkpoint
from fp8lab.training.checkpoint import PARTS, TrainingState


def load_latest(folder: Path) -> TrainingState | None:
    """The newest whole checkpoint in a run's folder, or None where there is none."""
    path = checkpoint.latest(folder)
    return None if path is None else _load(path)


def load_step(folder: Path, step: int) -> TrainingState:
    """The checkpoint after `step` steps."""
    return _load(checkpoint.at_step(folder, step))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Give the checkpoint `path` another file `name`, with a checksum to match."""
    (path / name).write_bytes(content)
    checksums = json.loads((path / "checksums.json").read_text())
    checksums[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "checksums.json").write_text(json.dumps(checksums))


def _load(path: Path) -> TrainingState:
    history = checkpoint.load_history(path)
    values = {field.name: getattr(history, field.name) for field in fields(history)}
    return TrainingState(**values, **{part: load_file(path / f"{part}.safetensors") for part in PARTS})
