"""Executing chapters: papermill, and only those whose inputs changed.

A chapter's inputs are its notebook, the parts of fp8lab that the chapters draw with, the plans, and every
record. Their digest is kept beside the executed copies; the same digest means nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from fp8lab.analysis.runs import outdated_runs
from fp8lab.errors import UserError
from fp8lab.notebooks import execute_notebook
from fp8lab.publish.book import Chapter, read_book
from fp8lab.publish.dependencies import PACKAGE, package_files
from fp8lab.records import write_atomically

WORKERS = 2


def execute_stale_chapters(root: Path, records_dir: Path) -> list[str]:
    """Execute the chapters of the book in `root` whose inputs changed since their last execution.

    Args:
        root: folder of ``_quarto.yml``; also the chapters' working directory.
        records_dir: absolute folder of run records: the chapters' one parameter.

    Returns:
        Names of the chapters that were executed.

    Raises:
        UserError: a chapter failed; the message names it and the folder of its executed copy, which has the traceback.
    """
    book = read_book(root)
    sources = [chapter.source for chapter in book.chapters]
    shared = _digest([*package_files(sources), *sorted((root / "runs" / "plans").glob("*.yaml"))], root)
    shared += _digest(_record_files(records_dir), records_dir) + str(records_dir)
    digests = {
        chapter.name: hashlib.sha256(chapter.source.read_bytes() + shared.encode()).hexdigest()
        for chapter in book.chapters
    }
    state_path = root / "build" / "executed" / "state.json"
    state = json.loads(state_path.read_bytes()) if state_path.exists() else {}
    stale = [
        chapter
        for chapter in book.chapters
        if state.get(chapter.name) != digests[chapter.name] or not chapter.executed.exists()
    ]
    if not stale:
        print(f"article: all {len(book.chapters)} chapters are up to date", flush=True)
        _name_outdated(records_dir)
        return []
    print(f"article: executing {len(stale)} of {len(book.chapters)} chapters", flush=True)
    failures: dict[str, list[str]] = {}
    for chapter, seconds, failure in _execute(stale, root, records_dir):
        if failure:
            failures.setdefault(failure, []).append(chapter.source.name)
            print(f"article: {chapter.name} failed", flush=True)
            continue
        # Quarto caches what its notebook filter returned by the time of the committed file alone.
        os.utime(chapter.source)
        state[chapter.name] = digests[chapter.name]
        write_atomically(state_path, json.dumps(state, indent=1).encode())
        print(f"article: {chapter.name} executed in {seconds:.0f} s", flush=True)
    if failures:
        # One damaged record stops every chapter that reads it: that is one thing to mend.
        said = "; ".join(f"{', '.join(names)}: {failure}" for failure, names in failures.items())
        raise UserError(f"{said} (tracebacks in {book.chapters[0].executed.parent})")
    _name_outdated(records_dir)
    return [chapter.name for chapter in stale]


def _name_outdated(records_dir: Path) -> None:
    """Say which runs no chapter shows, and what to do about it."""
    for run in outdated_runs(records_dir):
        print(
            f"article: {run} is left out, since later runs of its plan have another tokenizer; "
            "`fp8lab run` with --replace trains it again",
            flush=True,
        )


def _execute(chapters: list[Chapter], root: Path, records_dir: Path) -> Iterable[tuple[Chapter, float, str | None]]:
    """Execute side by side; yield (chapter, seconds, failure) as each ends."""
    workers = min(WORKERS, len(chapters))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_set_environment) as pool:
        jobs = {
            pool.submit(_execute_one, chapter.source, chapter.executed, root, records_dir): chapter
            for chapter in chapters
        }
        for job in as_completed(jobs):
            yield (jobs[job], *job.result())


def _set_environment() -> None:
    """For the kernels that this process starts: they import the package that publishes, and need no display.

    They share the cores: with more threads than cores, small linear algebra mostly waits.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


def _execute_one(source: Path, executed: Path, root: Path, records_dir: Path) -> tuple[float, str | None]:
    """Execute one notebook; returns seconds and, if it failed, one line that says why: the error's."""
    from papermill.exceptions import PapermillExecutionError

    started = time.monotonic()
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        execute_notebook(source, executed, {"records_dir": str(records_dir)}, cwd=root)
    except PapermillExecutionError as error:
        return time.monotonic() - started, f"{error.ename}: {error.evalue}"
    return time.monotonic() - started, None


def _record_files(records_dir: Path) -> list[Path]:
    return sorted(path for path in records_dir.rglob("*") if path.suffix in (".json", ".parquet"))


def _digest(files: Iterable[Path], base: Path) -> str:
    """Digest of the contents and relative names of files; one that does not exist counts as empty."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{os.path.relpath(path, base)}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
