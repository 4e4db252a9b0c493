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


def run_all(processes: Sequence[ForkServerProcess], at_once: int, seconds: float) -> str | None:
    """Run them in their order, so many at once, until all have ended well.

    Returns:
        What went wrong, as soon as it does; none of them then goes on. Otherwise None.
    """
    waiting = list(processes)
    running: dict[int, ForkServerProcess] = {}
    deadline = time.monotonic() + seconds
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                process = waiting.pop(0)
                process.start()
                running[process.sentinel] = process
            ended = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ended:
                names = ", ".join(process.name for process in running.values())
                return f"{names}: not ended after {seconds:.0f} s"
            for sentinel in ended:
                process = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    return f"{process.name}: exit code {process.exitcode}"
        return None
    finally:
        for process in running.values():
            process.kill()


def told(failure: str, root: Path) -> str:
    """A failure of `run_all`, with what the processes that write their errors to `root` had to say."""
    return "\n".join([failure, *(path.read_text() for path in sorted(root.glob("errors-*.txt")))])
