"""What running costs and survives: what the benchmarks measured, and what the fault tests saw."""

from __future__ import annotations

from pathlib import Path

from fp8lab import records
from fp8lab.records import BENCHMARK_PLAN, BenchmarkRecord, TestRecord

RELIABILITY_PLAN = "reliability"
FAULT_RUN = "fault-tests"
"""The record that the fault tests wrote themselves."""
FAULT_COMMAND = "make reliability"
BENCHMARK_COMMAND = "python -m fp8lab.benchmark"


def data_benchmarks(records_dir: Path) -> list[BenchmarkRecord]:
    """What `fp8lab.data.benchmark` measured, by name."""
    return _benchmarks(records_dir, "data-")


def trainer_benchmarks(records_dir: Path) -> list[BenchmarkRecord]:
    """What `fp8lab.benchmark` measured on GPUs, by name: off them it measures nothing that a reader wants to know."""
    return [
        record
        for record in _benchmarks(records_dir, "trainer-")
        if not record.provenance.device_name.upper().startswith("CPU")
    ]


def _benchmarks(records_dir: Path, prefix: str) -> list[BenchmarkRecord]:
    found = (record for _, record in records.read_plan(records_dir, BENCHMARK_PLAN))
    return [record for record in found if isinstance(record, BenchmarkRecord) and record.run.startswith(prefix)]


def fault_record(records_dir: Path) -> TestRecord | None:
    """What the fault tests saw, or None where they have written no record."""
    folder = records.record_dir(records_dir, RELIABILITY_PLAN, FAULT_RUN)
    if not (folder / "record.json").exists():
        return None
    record = records.read(folder)
    return record if isinstance(record, TestRecord) else None
