"""What a killed and resumed run has lost, beside two that ran through."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from fp8lab import records
from fp8lab.benchmark.paced import shortened
from fp8lab.config import RunConfig
from fp8lab.training import trainer
from fp8lab.training.checkpoint import MODEL_FILE, saved_steps

POLL_SECONDS = 0.01
PATIENCE_SECONDS = 600

StartWorker = Callable[[list[str], Path], BaseProcess]
"""Starts a process that trains by the arguments of `fp8lab.training.trainer.main`, and writes its output to a file."""


def spawn(arguments: list[str], output: Path) -> BaseProcess:
    """The training worker in a new interpreter."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(arguments, output))
    process.start()
    return process


def _train(arguments: list[str], output: Path) -> None:
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(trainer.main(arguments))


def measure_resume(
    config: RunConfig,
    *,
    data_dir: Path,
    scratch: Path,
    steps: int,
    start: StartWorker = spawn,
) -> dict[str, Any]:
    """Train the same short run three times: twice to its end, and once killed (SIGKILL) and resumed.

    The two whole runs are the control: a GPU adds in no fixed order, so they may differ as well.

    Returns:
        `control` and `resumed`, each compared with the first whole run (`_compare`); `killed_after_checkpoint`, the
        step of the newest checkpoint at the kill.
    """
    interval = max(1, steps // 4)
    config = shortened(config, steps, checkpoint_interval=interval, log_interval=1)
    runs = {name: _Worker(config, start, data_dir, scratch / name) for name in ("whole", "control", "resumed")}
    runs["whole"].run()
    runs["control"].run()
    killed_after = runs["resumed"].kill(after_checkpoint=interval)
    runs["resumed"].run()
    return {
        "steps": steps,
        "killed_after_checkpoint": killed_after,
        "control": _compare(runs["whole"], runs["control"]),
        "resumed": _compare(runs["whole"], runs["resumed"]),
    }


class _Worker:
    """The training worker in a process of its own, on folders of its own."""

    def __init__(self, config: RunConfig, start: StartWorker, data_dir: Path, root: Path) -> None:
        root.mkdir(parents=True)
        self.checkpoints = root / "checkpoints" / config.plan / config.run
        self.record_folder = root / "records" / config.plan / config.run
        path = root / "config.json"
        path.write_text(config.model_dump_json())
        folders = {"records": root / "records", "data": data_dir, "checkpoints": root / "checkpoints"}
        arguments = [str(path), *(f"--{name}-dir={folder}" for name, folder in folders.items())]
        # Not a pipe: one that nobody empties stops who writes to it.
        self._output = root / "output.txt"
        self._start = functools.partial(start, arguments, self._output)

    def run(self) -> None:
        """Train to the end."""
        process = self._start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the worker ended with {process.exitcode}: {self._said()}")

    def kill(self, *, after_checkpoint: int) -> int:
        """Start, and kill as soon as the checkpoint after that step is there; returns the newest one's step."""
        process = self._start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while after_checkpoint not in saved_steps(self.checkpoints):
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"no checkpoint to kill the worker after: {self._said()}")
            time.sleep(POLL_SECONDS)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError("the worker was through before it could be killed: let it take more steps")
        return max(saved_steps(self.checkpoints))

    def _said(self) -> str:
        return self._output.read_text().strip()


def _compare(one: _Worker, other: _Worker) -> dict[str, Any]:
    """How far two finished runs of one configuration are apart: final weights, training losses, validation loss."""
    weights, others = (load_file(worker.checkpoints / MODEL_FILE) for worker in (one, other))
    differences = {name: (weights[name] - others[name]).abs() for name in weights}
    curves = [records.read_table(worker.record_folder, "metrics") for worker in (one, other)]
    finals = []
    for worker in (one, other):
        record = records.read(worker.record_folder)
        assert isinstance(record, records.TrainRecord)
        assert record.final is not None
        finals.append(record.final.validation_loss)
    return {
        "weights_identical": all(torch.equal(weights[name], others[name]) for name in weights),
        "largest_weight_difference": max(float(difference.max()) for difference in differences.values()),
        "equal_weights_share": sum(int((difference == 0).sum()) for difference in differences.values())
        / sum(difference.numel() for difference in differences.values()),
        **_compare_curves(*curves),
        "validation_loss_difference": finals[1] - finals[0],
    }


def _compare_curves(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """Where two runs' rows of metrics part.

    A loss that is NaN in both, a skipped step's, is the same; one that is NaN, or missing, in one of them is not. The
    largest difference is of losses that are finite in both.
    """
    losses, others = (curve.set_index("step")["loss"] for curve in (one, other))
    losses, others = losses.align(others)
    parted = losses.index[(losses != others) & ~(losses.isna() & others.isna())]
    differences = (losses - others).abs()
    return {
        "steps_logged": [len(one), len(other)],
        "curve_identical": len(one) == len(other) and not len(parted),
        "first_different_step": int(parted[0]) if len(parted) else None,
        "largest_loss_difference": float(differences[np.isfinite(differences)].max()),
    }
