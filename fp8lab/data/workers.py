"""Worker processes that a build's stages share, and the progress bar over them.

No worker outlives its parent, however that one ended, and none hears the interrupt of a terminal: the parent ends them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Result = TypeVar("Result")

_documents_done: Any = None


def _start_worker(documents_done: Any) -> None:
    global _documents_done
    _documents_done = documents_done
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    # Else `datasets` imports torch: seconds and 200 MB in every worker, for nothing.
    os.environ["USE_TORCH"] = "0"


def _end_with_parent() -> None:
    """End this process as soon as its parent has: no pipe tells it so, for its siblings hold the same ones open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in here never see SIGINT, not even while they still import; this one does afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def counted(documents: Iterable[Result]) -> Iterator[Result]:
    """Pass documents through, adding to the count that the progress bar shows."""
    for document in documents:
        if _documents_done is not None:
            with _documents_done.get_lock():
                _documents_done.value += 1
        yield document


class WorkerPool:
    """Worker processes with a progress bar for each stage; one process means this one.

    Leaving the context waits for what the workers are doing; leaving it by an exception ends them at once.
    """

    def __init__(self, processes: int, console: Console | None) -> None:
        self._console = console or Console(stderr=True)
        self._count: Any = None
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        if processes > 1:
            # Spawned, not forked: the caller may hold threads (torch, tokenizers).
            context = multiprocessing.get_context("spawn")
            self._count = context.Value("q", 0)
            self._executor = concurrent.futures.ProcessPoolExecutor(
                processes, mp_context=context, initializer=_start_worker, initargs=(self._count,)
            )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        if exception is not None:
            # What `terminate_workers` does from Python 3.14 on.
            for process in list(self._executor._processes.values()):
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, stage: str, function: Callable[[Any], Result], tasks: Sequence[Any]) -> list[Result]:
        """`function` of each task, in the order of `tasks`.

        Raises:
            BrokenProcessPool: a worker was killed.
            Exception: the first that `function` raised.
        """
        if not tasks:
            return []
        with Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("parts · {task.fields[documents]:,} documents"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        ) as progress:
            bar = progress.add_task(stage, total=len(tasks), documents=0)
            if self._executor is None:
                results = []
                for task in tasks:
                    results.append(function(task))
                    progress.advance(bar)
                return results
            self._count.value = 0
            with _interrupts_blocked():  # a worker starts where a task finds none idle
                futures = [self._executor.submit(function, task) for task in tasks]
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, timeout=0.25)
                for future in done:
                    future.result()  # raise at the first failure, not after the last part
                progress.update(bar, completed=len(futures) - len(waiting), documents=self._count.value)
            return [future.result() for future in futures]
