"""What the benchmarks share: the spread of a measurement, its record, and how they speak of mistakes.

A benchmark measures in rounds and keeps the figure of each, since a median alone would hide how much the machine
wavers. It writes a record like any other, ``runs/records/benchmarks/<name>/``.
"""

from __future__ import annotations

import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fp8lab import records
from fp8lab.errors import UserError
from fp8lab.provenance import collect_provenance, utc_now

console = Console()


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all rounds of a measurement."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def print_summary(what: str, measured: dict[str, Any]) -> None:
    """A line with the median and extremes of a `summary`."""
    console.print(f"{what}: median {measured['median']:,.2f}, from {measured['min']:,.2f} to {measured['max']:,.2f}")


def begin_provenance(module: str, device_name: str) -> records.Provenance:
    """Of a benchmark that begins now: its command is ``python -m <module>`` with this process's arguments."""
    provenance = collect_provenance(device_name)
    provenance.command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return provenance


def write_benchmark(
    run: str,
    results: dict[str, Any],
    provenance: records.Provenance,
    records_dir: Path,
    config: dict[str, Any] | None = None,
) -> None:
    """Write the finished record ``<records_dir>/benchmarks/<run>/``."""
    provenance.ended_utc = utc_now()
    records.write(
        records.BenchmarkRecord(
            plan=records.BENCHMARK_PLAN,
            run=run,
            status="finished",
            provenance=provenance,
            results=results,
            config=config or {},
        ),
        records_dir,
    )


def slug(name: str) -> str:
    """`name` as part of a record's: 'NVIDIA H100 80GB HBM3' is 'NVIDIA-H100-80GB-HBM3'."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def run_app(app: typer.Typer) -> None:
    """Run a benchmark's commands: a mistake of the user's is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
