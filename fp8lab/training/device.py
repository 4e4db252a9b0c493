"""The device that a process trains on, and its memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from fp8lab.provenance import cpu_name


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What records call `device`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@contextlib.contextmanager
def older_objects_kept() -> Iterator[None]:
    """Make `release_memory` look at newer objects alone: at all of a process's it takes a good part of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_memory(device: torch.device) -> None:
    """Give back what nothing uses any more."""
    # A failed step's graph may be in reference cycles.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
