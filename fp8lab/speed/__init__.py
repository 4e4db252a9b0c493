"""Speed: whole optimizer steps of several recipes, alternating in one process.

A GPU's clock drifts with its temperature and power, and two processes never meet the same one. So the
contestants of a case take turns (A B A B ...), and a ratio is formed within a round. They share one set of
master weights and one optimizer: only what a recipe adds is in memory twice.

A timed step is the trainer's: forward under BF16 autocast, backward, global gradient norm, fused AdamW with
clipping, FP32 master weights. Before the rounds, every contestant trains from the same initial weights on
the same batches; these warm-up losses show whether it learns as BF16 does, and compilation ends there. Each
case also gets a profile of one step by category, and the time of its GEMMs alone, in BF16 and FP8: the
speed of a recipe whose casts cost nothing.

A record is called an occasion. A time budget ends one after a whole round; measuring the same occasion
again, on the same device and with the same code, goes on with the cases that are missing.

On a CPU the same plan runs emulated, to test this code: those times say nothing about FP8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fp8lab import records
from fp8lab.errors import UserError
from fp8lab.precision import fp8_tensor_cores
from fp8lab.provenance import collect_provenance, utc_now
from fp8lab.records import SpeedRecord
from fp8lab.speed.batches import batch_source
from fp8lab.speed.case import Measurement, failure
from fp8lab.speed.plan import SpeedCase, SpeedPlan, load_speed_plan
from fp8lab.training.device import device_name, older_objects_kept, release_memory, training_device

__all__ = ["SpeedPlan", "load_speed_plan", "measure", "new_occasion", "summary"]


def measure(
    plan: SpeedPlan,
    *,
    records_dir: Path,
    data_dir: Path,
    occasion: str | None = None,
    only: Sequence[str] = (),
    budget_seconds: float | None = None,
    on_case: Callable[[int, str], None] = lambda _, line: print(line, flush=True),
) -> SpeedRecord:
    """Run the cases of `plan` that fit into the budget; the record is written after each.

    Args:
        occasion: name of the record; the UTC time if None. Of one that exists, the missing cases are measured.
        only: shell patterns; only cases whose names match one are measured.
        budget_seconds: stop starting rounds and cases after this long.
        on_case: called with the number of cases done and a line about the last.

    Returns:
        The record; its status is 'interrupted' while cases of the plan are missing. A case that fails is in it with its
        error.

    Raises:
        UserError: the occasion exists with another plan, device, commit or versions, or a pattern matches no case.
    """
    chosen = plan.only(only)
    device = training_device()
    deadline = time.monotonic() + (budget_seconds or float("inf"))
    batches, source = batch_source(plan, data_dir)
    record, rows = _occasion(plan, chosen, records_dir, occasion or new_occasion(), source, device)
    cases = record.results["cases"]
    for case in chosen:
        if case.name in cases:
            continue
        if time.monotonic() > deadline:
            break
        try:
            with older_objects_kept():
                cases[case.name], case_rows = Measurement(plan, case, device, batches, deadline).run()
        except (RuntimeError, UserError) as error:
            cases[case.name], case_rows = failure(error), []
        release_memory(device)
        rows.extend(case_rows)
        _write(record, rows, records_dir)
        on_case(len(cases), _summary(case.name, cases[case.name], emulated=record.results["emulated"]))
    missing = [case for case in plan.cases if case.name not in cases]
    record.status = "interrupted" if missing else "finished"
    record.reason = None
    if missing:
        is_cut = any(case in chosen for case in missing)
        record.reason = "the time budget ended before the last case" if is_cut else "the other cases were not asked for"
    _write(record, rows, records_dir)
    return record


def new_occasion() -> str:
    """A name for a record that begins now: the UTC time."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _occasion(
    plan: SpeedPlan,
    chosen: Sequence[SpeedCase],
    records_dir: Path,
    occasion: str,
    source: str,
    device: torch.device,
) -> tuple[SpeedRecord, list[dict[str, Any]]]:
    """A new record, or an old one without those of the `chosen` cases that failed; and its timed steps."""
    config = plan.model_dump(mode="json")
    record = SpeedRecord(
        plan=plan.name,
        run=occasion,
        status="running",
        provenance=collect_provenance(device_name(device)),
        results={"tokens": source, "emulated": not fp8_tensor_cores(), "cases": {}},
        config=config,
    )
    folder = records.record_dir(records_dir, plan.name, occasion)
    if not (folder / "record.json").exists():
        return record, []
    old = records.read(folder)
    assert isinstance(old, SpeedRecord)
    if old.config != config or old.provenance.device_name != record.provenance.device_name:
        raise UserError(f"{folder}: measured with another plan or device; choose another occasion")
    # One record has one provenance.
    for what in ("git_commit", "versions"):
        before, now = getattr(old.provenance, what), getattr(record.provenance, what)
        if before != now:
            raise UserError(f"{folder}: measured with another {what} ({before}, now {now}); choose another occasion")
    repeated = {case.name for case in chosen}
    record.results["cases"] = {
        name: results
        for name, results in old.results["cases"].items()
        if "error" not in results or name not in repeated
    }
    steps = records.read_table(folder, "steps")
    return record, [{str(key): value for key, value in row.items()} for row in steps.to_dict("records")]


def _write(record: SpeedRecord, rows: list[dict[str, Any]], records_dir: Path) -> None:
    record.provenance.ended_utc = utc_now()
    folder = records.record_dir(records_dir, record.plan, record.run)
    # The table first: what the record says was timed is then there to read, whenever the process dies.
    records.write_table(folder, "steps", pd.DataFrame(rows, columns=list(records.COLUMNS["steps"])))
    records.write(record, records_dir)


def summary(record: SpeedRecord) -> list[str]:
    """A line a case: each contestant's step time and, unless emulated, tokens/s and ratio to BF16."""
    emulated = record.results["emulated"]
    return [_summary(name, results, emulated=emulated) for name, results in record.results["cases"].items()]


def _summary(name: str, results: dict[str, Any], *, emulated: bool) -> str:
    if "error" in results:
        return f"{name}: {results['error']}"
    contestants = results["contestants"]
    baseline = contestants.get("bf16", {}).get("step_ms_median")
    parts = ["emulated, no measure of FP8"] if emulated else []
    parts += [f"{left_out}: {failure['error']}" for left_out, failure in results["errors"].items()]
    for contestant, measured in contestants.items():
        step_ms = measured["step_ms_median"]
        ratio = f", {baseline / step_ms:.3f}x" if baseline else ""
        speed = "" if emulated else f" ({measured['tokens_per_second']:,.0f} tokens/s{ratio})"
        parts.append(f"{contestant} {step_ms:.1f} ms{speed}")
    return f"{name}: " + "; ".join(parts)
