"""Faults survived and what the trainer costs, for reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from fp8lab.errors import UserError
from fp8lab.records import BenchmarkRecord, TestRecord
from fp8lab.units import signed, unique

FAULT_TOPICS = ("kill", "signal", "damage", "disk", "non-finite", "memory", "lock", "strangers", "writing")
"""What the fault tests report on, in the order of the article."""


def faults(record: TestRecord) -> pd.DataFrame:
    """A row a fault: what was done, what the run did, and in which precisions the tests saw it.

    Raises:
        UserError: a report of an unknown topic, or with a field missing.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for report in _fault_reports(record):
        recipes = rows.setdefault((report["fault"], report["outcome"]), [])
        if "recipe" in report["measured"]:
            recipes.append(report["measured"]["recipe"])
    return pd.DataFrame(
        [
            {"fault": fault, "what the run does": outcome, "seen in": ", ".join(unique(recipes)) or "–"}
            for (fault, outcome), recipes in rows.items()
        ],
        columns=["fault", "what the run does", "seen in"],
    )


def fault_measurements(record: TestRecord) -> pd.DataFrame:
    """A row a report: the test, and what it measured in its own words.

    Raises:
        UserError: as `faults`.
    """
    rows = []
    for report in _fault_reports(record):
        measured = [
            f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in report["measured"].items()
        ]
        test = report["test"].rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        rows.append({"test": test, "measured": "; ".join(measured)})
    return pd.DataFrame(rows, columns=["test", "measured"])


def _fault_reports(record: TestRecord) -> list[Mapping[str, Any]]:
    """The reports, by topic."""
    where = f"{record.plan}/{record.run}/record.json"
    reports = record.results.get("faults", [])
    for report in reports:
        missing = [key for key in ("topic", "fault", "outcome", "measured", "test", "passed") if key not in report]
        if missing:
            raise UserError(f"{where}: faults: {missing[0]}: missing")
        if report["topic"] not in FAULT_TOPICS:
            raise UserError(f"{where}: faults: unknown topic {report['topic']!r}; known: {', '.join(FAULT_TOPICS)}")
    return sorted(reports, key=lambda report: FAULT_TOPICS.index(report["topic"]))


def trainer_benchmarks(benchmarks: Sequence[BenchmarkRecord]) -> pd.DataFrame:
    """What the trainer adds to the bare step, and what checkpoints cost (records of `fp8lab.benchmark`).

    Raises:
        UserError: a field is missing.
    """
    return _benchmark_rows(
        benchmarks,
        {"trainer-overhead": _overhead_rows, "trainer-checkpoint": _checkpoint_rows},
        ["model", "recipe", "what", "median", "range", "goal"],
    )


def resumed_runs(benchmarks: Sequence[BenchmarkRecord]) -> pd.DataFrame:
    """Two runs of one configuration compared: one killed and resumed, or (the control) neither.

    Raises:
        UserError: a field is missing.
    """
    columns = ["model", "recipe", "compared with a whole run", "weights equal", "largest difference of a weight"]
    columns += ["first step whose loss differs", "largest difference of a loss (nats)", "of the validation loss (nats)"]
    return _benchmark_rows(benchmarks, {"trainer-resume": _resume_rows}, columns)


def _benchmark_rows(
    benchmarks: Sequence[BenchmarkRecord],
    kinds: Mapping[str, Callable[[Mapping[str, Any]], list[tuple[str, ...]]]],
    columns: list[str],
) -> pd.DataFrame:
    rows: list[tuple[str, ...]] = []
    for kind, make_rows in kinds.items():
        for record in benchmarks:
            if not record.run.startswith(f"{kind}-"):
                continue
            try:
                identity = (record.results["model"], record.results["recipe"])
                rows += [(*identity, *row) for row in make_rows(record.results)]
            except KeyError as error:
                raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows, columns=columns)


def _summary_row(what: str, measured: Mapping[str, Any], form: str, goal: str = "–") -> tuple[str, ...]:
    def shown(value: float) -> str:
        return form.format(value).replace("-", "−")

    return what, shown(measured["median"]), f"{shown(measured['min'])} to {shown(measured['max'])}", goal


def _overhead_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        _summary_row("bare step (ms)", _scaled(results["bare_step_seconds"], 1e3), "{:.2f}"),
        _summary_row("data and logging (% of it)", _scaled(results["loop_share"], 100), "{:+.2f}"),
    ]
    for what, goal in (("health", "< 1"), ("validation", "–")):
        if results[f"{what}_share"] is not None:
            rows.append(_summary_row(f"{what} (% of it)", _scaled(results[f"{what}_share"], 100), "{:+.2f}", goal))
    return [*rows, _summary_row("all together (% of it)", _scaled(results["overhead"], 100), "{:+.2f}", "< 2")]


def _checkpoint_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        ("checkpoint (GB)", f"{results['checkpoint_bytes'] / 1e9:.2f}", "–", "–"),
        _summary_row("written in the background in (s)", results["write_seconds"], "{:.2f}"),
        _summary_row("the loop stands for (s)", results["stall_seconds"], "{:.3f}"),
        _summary_row("training loses (s)", results["lost_seconds"], "{:.3f}"),
        _summary_row(f"of {results['save_every']} steps (%)", _scaled(results["cost"], 100), "{:.2f}", "< 2"),
    ]


def _scaled(measured: Mapping[str, Any], factor: float) -> dict[str, float]:
    return {key: factor * measured[key] for key in ("median", "min", "max")}


def _resume_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for what, name in (("control", "a second whole run"), ("resumed", "killed and resumed")):
        compared = results[what]
        first = compared["first_different_step"]
        rows.append(
            (
                name,
                f"{compared['equal_weights_share']:.2%}" if not compared["weights_identical"] else "all, bit for bit",
                f"{compared['largest_weight_difference']:.2g}",
                "none" if first is None else str(first),
                f"{compared['largest_loss_difference']:.2g}",
                signed(compared["validation_loss_difference"]),
            )
        )
    return rows
