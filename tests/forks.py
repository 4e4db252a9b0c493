"""Processes forked from one that has imported the trainer and computed nothing: each starts seconds sooner."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
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


def wait_for(processes: Sequence[ForkServerProcess], seconds: float) -> str | None:
    """Wait until all have ended well. Otherwise what went wrong, as soon as it does; none of them then goes on."""
    running = {process.sentinel: number for number, process in enumerate(processes)}
    deadline = time.monotonic() + seconds
    try:
        while running:
            ended = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ended:
                return f"processes {sorted(running.values())} still ran after {seconds:.0f} s"
            for sentinel in ended:
                number = running.pop(sentinel)  # type: ignore[call-overload]
                processes[number].join()
                if processes[number].exitcode:
                    return f"process {number} ended with exit code {processes[number].exitcode}"
        return None
    finally:
        for process in processes:
            process.kill()
