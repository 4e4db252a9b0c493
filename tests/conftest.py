"""What several test modules share: the demo's runs, trained once a session.

pytest reads this before its workers start, so what imports more than torch is imported where it is used.
"""

from __future__ import annotations

import fcntl
import gc
import os
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import forks
from tests.faults.record import fault_report, pytest_addoption, pytest_configure
from tests.forks import ROOT

if TYPE_CHECKING:
    from fp8lab import records
    from fp8lab.config import RunConfig
    from fp8lab.plan import Plan

PATIENCE_SECONDS = 3600

__all__ = ["ROOT", "demo_runs", "fault_report", "pytest_addoption", "pytest_configure", "server"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """What looks at the demo's runs does so in one worker, and may take long: training shares the cores."""
    if _uses_demo(item):
        item.add_marker(pytest.mark.xdist_group("demo"))
        item.add_marker(pytest.mark.timeout(3600))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest work first."""
    items.sort(key=lambda item: not _uses_demo(item))


def _uses_demo(item: pytest.Item) -> bool:
    return "demo_runs" in getattr(item, "fixturenames", ())


@dataclass(frozen=True)
class DemoRuns:
    """Folders of a trained demo plan."""

    plan: Plan
    records_dir: Path
    data_dir: Path
    checkpoints_dir: Path

    def record(self, config: RunConfig) -> records.TrainRecord:
        from fp8lab import records

        record = records.read(records.record_dir(self.records_dir, config.plan, config.run))
        assert isinstance(record, records.TrainRecord)
        return record


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    """Forks trainers from a process that has imported them."""
    return forks.start_server()


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory, server: ForkServerContext) -> DemoRuns:
    """Every run of ``runs/plans/demo.yaml``, trained by the worker in processes of one thread: about two minutes."""
    from fp8lab.plan import load_plan

    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its workers a base of its own; they share the one above, and the demo in it.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    plan = load_plan(ROOT / "runs" / "plans" / "demo.yaml")
    demo = DemoRuns(plan, root / "records", root / "data", root / "checkpoints")
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "trained").exists():
            _train_demo(demo, root, server)
            (root / "trained").touch()
    return demo


def _train_demo(demo: DemoRuns, root: Path, server: ForkServerContext) -> None:
    from fp8lab.data import build, load_mixture
    from fp8lab.training import trainer

    build(load_mixture("demo"), demo.data_dir)
    processes = []
    for config in demo.plan.runs:
        path = root / f"{config.run}.json"
        path.write_text(config.model_dump_json())
        arguments = [str(path)]
        for option in ("records_dir", "data_dir", "checkpoints_dir"):
            arguments += [f"--{option.replace('_', '-')}", str(getattr(demo, option))]
        errors = root / f"errors-{config.run}.txt"
        processes.append(server.Process(name=config.run, target=forks.run, args=(trainer.main, arguments, errors)))
    failure = forks.run_all(processes, os.cpu_count() or 1, PATIENCE_SECONDS)
    assert failure is None, forks.told(failure, root)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
