"""Processes forked from one that has imported the trainer and computed nothing: each starts seconds sooner."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start_server() -> ForkServerContext:
    """The context whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.worker"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        # With the first process the server starts, and keeps its environment.
        process = context.Process(target=os.getpid)
        process.start()
    process.join()
    return context


def errors_to(path: Path) -> None:
    """Have this process write standard error to a file."""
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)


def run(main: Callable[[list[str]], int], arguments: list[str], errors: Path) -> None:
    """`main` as a fork, its exit code the process's and its standard error in a file."""
    errors_to(errors)
    sys.exit(main(arguments))
