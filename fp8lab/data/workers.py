"""Worker processes that a build's stages share, and the progress bar over them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Result = TypeVar("Result")

_documents_done: Any = None


def _start_worker(documents_done: Any) -> None:
    global _documents_done
    _documents_done = documents_done
    # Else `datasets` imports torch: seconds and 200 MB in every worker, for nothing.
    os.environ["USE_TORCH"] = "0"


def counted(documents: Iterable[Result]) -> Iterator[Result]:
    """Pass documents through, adding to the count that the progress bar shows."""
    for document in documents:
        if _documents_done is not None:
            with _documents_done.get_lock():
                _documents_done.value += 1
        yield document


class WorkerPool:
    """Worker processes with a progress bar for each stage; one process means this one."""

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

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, stage: str, function: Callable[[Any], Result], tasks: Sequence[Any]) -> list[Result]:
        """`function` of each task, in the order of `tasks`."""
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
            futures = [self._executor.submit(function, task) for task in tasks]
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, timeout=0.25)
                for future in done:
                    future.result()  # raise at the first failure, not after the last part
                progress.update(bar, completed=len(futures) - len(waiting), documents=self._count.value)
            return [future.result() for future in futures]
