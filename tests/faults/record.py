"""The fault tests' own record: ``pytest --record-faults runs/records``.

A test that has seen a run survive a fault says so through the fixture `fault_report`. With the option, the session
writes what was said, and whether each test passed, as the record ``reliability/fault-tests``, from which the article's
chapter on reliability is made. Without it nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "fault"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-faults", type=Path, metavar="DIR", help="write the fault tests' record into DIR")


def pytest_configure(config: pytest.Config) -> None:
    # Under xdist the controller hears of every worker's reports.
    if config.getoption("--record-faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FaultRecord(config.getoption("--record-faults")))


@pytest.fixture
def fault_report(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Say what a fault did, after the assertions that show it.

    Call it with the fault's topic (one of `fp8lab.tables.operation.FAULT_TOPICS`), what was done, what the run did, and
    as keywords what was measured: JSON values. A keyword `recipe` names the precision.
    """

    def report(topic: str, fault: str, outcome: str, **measured: Any) -> None:
        record_property(PROPERTY, {"topic": topic, "fault": fault, "outcome": outcome, "measured": measured})

    return report


class _FaultRecord:
    """Gathers the reports of one session and writes them at its end."""

    def __init__(self, records_dir: Path) -> None:
        from fp8lab.provenance import collect_provenance
        from fp8lab.training.device import device_name, training_device

        self._records_dir = records_dir
        self._faults: list[dict[str, Any]] = []
        self._failed: list[str] = []
        self._provenance = collect_provenance(device_name(training_device()))
        self._provenance.command = "make reliability"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)
        if report.when == "call":
            self._faults += [
                # xdist appends its group.
                {**value, "test": report.nodeid.partition("@")[0], "passed": report.passed}
                for name, value in report.user_properties
                if name == PROPERTY and isinstance(value, dict)
            ]

    def pytest_sessionfinish(self) -> None:
        from fp8lab import records
        from fp8lab.analysis.operation import FAULT_RUN, RELIABILITY_PLAN
        from fp8lab.provenance import utc_now

        self._provenance.ended_utc = utc_now()
        record = records.TestRecord(
            plan=RELIABILITY_PLAN,
            run=FAULT_RUN,
            status="failed" if self._failed else "finished",
            reason=f"failed: {', '.join(sorted(self._failed))}" if self._failed else None,
            provenance=self._provenance,
            results={"faults": sorted(self._faults, key=lambda fault: fault["test"])},
        )
        records.write(record, self._records_dir)
