"""What ``fp8lab status`` shows: how far each run is, from its record and from the news of who trains it."""

from __future__ import annotations

from pathlib import Path

from fp8lab import records
from fp8lab.plan import Plan
from fp8lab.progress import SILENT_SECONDS, Progress, clock, is_locked, read_progress


def status_rows(plan: Plan | None, records_dir: Path, checkpoints_dir: Path) -> list[tuple[str, ...]]:
    """A row a run: plan, run, status, step, loss, tokens/s, detail."""
    planned = [(config.plan, config.run) for config in plan.runs] if plan else []
    recorded = {
        (path.parts[-3], path.parts[-2]) for path in records_dir.glob(f"{plan.name if plan else '*'}/*/record.json")
    }
    keys = planned + sorted(recorded - set(planned))
    return [_status_row(name, run, records_dir, checkpoints_dir) for name, run in keys]


def _status_row(plan: str, run: str, records_dir: Path, checkpoints_dir: Path) -> tuple[str, ...]:
    folder = records.record_dir(records_dir, plan, run)
    if not (folder / "record.json").exists():
        return plan, run, "to do", "", "", "", ""
    record = records.read(folder)
    if not isinstance(record, records.TrainRecord):
        return plan, run, record.status, "", "", "", record.kind
    work = checkpoints_dir / plan / run
    progress = read_progress(work / "progress.json")
    if record.status == "running" and progress is not None:
        status, detail = _status_in_progress(progress, work)
        loss = "" if progress.loss is None else f"{progress.loss:.4f}"
        speed = "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}"
        return plan, run, status, f"{progress.step}/{progress.steps}", loss, speed, detail
    loss = f"{record.final.validation_loss:.4f}" if record.final else ""
    median = record.speed.tokens_per_second_median if record.speed else None
    speed = "" if median is None else f"{median:,.0f}"
    return plan, run, record.status, str(record.steps), loss, speed, record.reason or ""


def _status_in_progress(progress: Progress, work: Path) -> tuple[str, str]:
    """Status and detail of a run whose record says that it is running, which a killed process cannot take back.

    Args:
        progress: the last news of it.
        work: its folder, which the process that trains it holds locked.
    """
    summary, age = progress.summary(), progress.age_seconds()
    heard = f"on {progress.host}, last heard of {clock(age)} ago"
    if progress.is_here():
        # A launcher has the ranks that will take the lock still to start.
        is_starting = progress.stage == "starting" and progress.is_alive()
        return ("running", summary) if is_starting or is_locked(work) else ("stopped", "the same command resumes it")
    # Another machine's lock is seen here only on some file systems, and its processes are on none.
    if is_locked(work) or age < SILENT_SECONDS:
        return "running", f"{summary}, {heard}"
    return "silent", f"{heard}; if it has stopped, the same command resumes it"
