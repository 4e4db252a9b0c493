"""The occasions on which models were timed: measurements with FP8 in hardware only.

The speed of emulated FP8 says nothing about FP8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fp8lab import records
from fp8lab.records import SpeedRecord

SPEED_PLANS = "speed-"
"""Beginning of the names of the plans that time whole models, each on a device of its own."""
MAP_PLAN = "speed-map"
"""The plan that times blocks of many widths, for the break-even."""
SPEED_COMMAND = "fp8lab speed runs/plans/speed-h200.yaml"
UNSAID_KERNELS = dict.fromkeys(("fdd9729", "33acd60"), "of 2026-11-27")
"""Of records that do not say which kernels they timed: commits whose kernels are the same."""


@dataclass(frozen=True)
class SpeedRun:
    """One process that measured speed."""

    folder: Path
    record: SpeedRecord

    @property
    def device(self) -> str:
        return self.record.provenance.device_name

    @property
    def span(self) -> tuple[str, str]:
        """When it began and ended, UTC in ISO 8601."""
        return self.record.provenance.started_utc, self.record.provenance.ended_utc

    @property
    def kernels(self) -> str:
        """Version of this project's kernels. Of records that do not say it, `UNSAID_KERNELS` or the commit."""
        provenance = self.record.provenance
        unsaid = UNSAID_KERNELS.get(provenance.git_commit[:7], provenance.git_commit)
        return provenance.versions.get(records.KERNELS, unsaid)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Every timed step, with its device and occasion."""
        occasion = f"{self.record.plan}/{self.record.run}"
        return records.read_table(self.folder, "steps").assign(device=self.device, occasion=occasion)

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """Results of the cases that could be measured, by name ('1.5B-T2048-B16')."""
        cases = self.record.results.get("cases", {})
        return {name: results for name, results in cases.items() if results.get("contestants")}

    def profiles(self) -> dict[str, dict[str, dict[str, float]]]:
        """case -> contestant -> category -> GPU milliseconds a step, where they were profiled."""
        return {
            case: {
                name: contestant["profile"]["ms_by_category"]
                for name, contestant in results["contestants"].items()
                if contestant.get("profile")
            }
            for case, results in self.cases.items()
        }

    @property
    def peers(self) -> dict[str, str]:
        """Version of each peer that was timed, by recipe."""
        return {recipe: version for case in self.cases.values() for recipe, version in case.get("peers", {}).items()}

    def failures(self) -> dict[str, str]:
        """What could not be timed ('1.5B-T2048-B16' or '1.5B-T2048-B16, rowwise') and its error."""
        failures = {}
        for case, results in self.record.results.get("cases", {}).items():
            if "error" in results:
                failures[case] = results["error"]
            for contestant, failure in results.get("errors", {}).items():
                failures[f"{case}, {contestant}"] = failure["error"]
        return failures


def speed_runs(records_dir: Path, plan: str | None = None) -> list[SpeedRun]:
    """Measurements of speed with FP8 in hardware; what was emulated or failed is left out.

    A measurement that its time budget ended holds whole rounds of the cases that it reached, and counts.

    Args:
        plan: the plan whose occasions are wanted; those of every plan that times whole models if None.
    """
    folders = sorted(folder.name for folder in records_dir.glob(f"{SPEED_PLANS}*") if folder.is_dir())
    plans = [plan] if plan else [name for name in folders if name != MAP_PLAN]
    return [
        SpeedRun(folder, record)
        for name in plans
        for folder, record in records.read_plan(records_dir, name)
        if isinstance(record, SpeedRecord)
        and record.status in ("finished", "interrupted")
        and record.results.get("emulated") is False
    ]
