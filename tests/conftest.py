"""What several test modules share: the demo's runs, trained once a session."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from fp8lab import records
from fp8lab.config import Plan, RunConfig, load_plan
from fp8lab.data import build, load_mixture
from tests.faults.record import fault_report, pytest_addoption, pytest_configure

__all__ = ["demo_runs", "fault_report", "pytest_addoption", "pytest_configure"]

ROOT = Path(__file__).parents[1]


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
        record = records.read(records.record_dir(self.records_dir, config.plan, config.run))
        assert isinstance(record, records.TrainRecord)
        return record


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> DemoRuns:
    """Every run of ``runs/plans/demo.yaml``, trained by the worker in processes of one thread: about three minutes."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its workers a base of its own; they share the one above, and the demo in it.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    plan = load_plan(ROOT / "runs" / "plans" / "demo.yaml")
    demo = DemoRuns(plan, root / "records", root / "data", root / "checkpoints")
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "trained").exists():
            _train_demo(demo, root)
            (root / "trained").touch()
    return demo


def _train_demo(demo: DemoRuns, root: Path) -> None:
    build(load_mixture("demo"), demo.data_dir)

    def train(config: RunConfig) -> None:
        path = root / f"{config.run}.json"
        path.write_text(config.model_dump_json())
        command = [sys.executable, "-m", "fp8lab.trainer", str(path)]
        for option in ("records_dir", "data_dir", "checkpoints_dir"):
            command += [f"--{option.replace('_', '-')}", str(getattr(demo, option))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(train, demo.plan.runs))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
