"""Plans through papermill: what runs, what is skipped, and what is left when a notebook dies.

The notebooks here stand in for ``runs/train.ipynb``: they write the same record in a second.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import yaml
from rich.console import Console

from fp8lab import records
from fp8lab.errors import UserError
from fp8lab.plan import Plan, load_plan, load_run
from fp8lab.progress import Progress, ProgressFile
from fp8lab.provenance import collect_provenance, command_line
from fp8lab.running import plans, stage
from fp8lab.running.gpus import Share
from fp8lab.running.plans import Options, evaluate_run, run_plan
from fp8lab.running.stage import StageInterrupted
from fp8lab.running.status import status_rows
from fp8lab.running.workspace import Workspace
from fp8lab.training import checkpoint
from tests.test_plan import ENTRY, TINY

PARAMETERS = "plan = run = runs = records_dir = data_dir = checkpoints_dir = mixture = None"
START = """
from pathlib import Path
from types import SimpleNamespace
from fp8lab import records
from fp8lab.plan import load_run
from fp8lab.provenance import collect_provenance
config = load_run(plan, run, mixture)
record = records.started(config, collect_provenance("CPU"), emulated=False)
work = Path(checkpoints_dir) / config.plan / config.run
"""
FINISH = """
record.status, record.tokens, record.steps = "finished", config.tokens, config.steps
records.write(record, Path(records_dir))
"""
FAIL = "records.write(record, Path(records_dir))\nraise RuntimeError('the loss is out of cheese')"
DIE = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
STOP_ON_SIGNAL = """
import signal, time
from fp8lab.progress import Progress, ProgressFile
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
for step in range(600):
    ProgressFile(work).update(lambda: Progress(stage="training", step=step, steps=600), now=True)
    time.sleep(0.1)
    if stopped:
        record.status, record.reason, record.steps = "interrupted", "SIGTERM", step
        records.write(record, Path(records_dir))
        break
"""


SERIES = """
from pathlib import Path
from types import SimpleNamespace
from fp8lab import records
from fp8lab.plan import load_run
from fp8lab.provenance import collect_provenance
for run in runs:
    config = load_run(plan, run, mixture)
    record = records.started(config, collect_provenance("CPU"), emulated=False)
    records.write(record, Path(records_dir))
    if config.seed == 2:
        import os
        os._exit(1)
    record.status = "finished"
    records.write(record, Path(records_dir))
"""


def make_project(root: Path, train: str, template: str = "train", **changes: object) -> tuple[Plan, Workspace]:
    (root / "runs" / "plans").mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in (START, train) if template == "train" or source is train]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, root / "runs" / f"{template}.ipynb")
    path = root / "runs" / "plans" / "p.yaml"
    model = TINY | {"name": "t"}
    entry = ENTRY | {"models": [model], "recipes": ["bf16"], "tokens": 64, "global_batch_tokens": 32}
    path.write_text(yaml.safe_dump({"name": "p", "description": "d", "entries": [entry | changes]}))
    workspace = Workspace(root, root / "records", root / "data", root / "checkpoints")
    return load_plan(path), workspace


def write_finished(plan: Plan, workspace: Workspace) -> Path:
    """The record of the plan's first run as if it were trained; its folder."""
    record = records.started(plan.runs[0], collect_provenance("CPU"), emulated=False)
    record.status = "finished"
    return records.write(record, workspace.records)


def execute(plan: Plan, workspace: Workspace, **options: object) -> tuple[int, str]:
    output = io.StringIO()
    unsuccessful = run_plan(plan, workspace, Options(**options), Console(file=output))  # type: ignore[arg-type]
    return unsuccessful, output.getvalue()


@pytest.fixture
def instantly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each notebook, without papermill: it finishes its run, leaves a table, and was executed."""

    def start(
        on: stage.Stage, template: str, folder: Path, parameters: dict[str, str], _log: Path, _share: Share
    ) -> object:
        (folder / f"{template}.ipynb").touch()
        config = load_run(parameters["plan"], parameters["run"])
        record = records.started(config, collect_provenance("CPU"), emulated=False)
        record.status = "finished"
        rows = pd.DataFrame({column: [1.0] for column in records.COLUMNS["metrics"]})
        records.write_table(records.write(record, on.workspace.records), "metrics", rows)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(stage.Stage, "_start", start)


def test_runs_at_once_each_see_a_gpu_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "import os\nPath(records_dir, config.run).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    plan, workspace = make_project(tmp_path, note + FINISH, seeds=[1, 2, 3, 4])
    monkeypatch.setattr(plans, "visible_gpus", lambda: ["3", "5"])
    assert execute(plan, workspace, jobs=2)[0] == 0
    seen = [(workspace.root / workspace.records / config.run).read_text() for config in plan.runs]
    assert set(seen) == {"3", "5"}
    provenances = [records.read(workspace.record(config)).provenance for config in plan.runs]
    assert {provenance.concurrent_runs for provenance in provenances} == {1}


@pytest.mark.parametrize(
    ("jobs", "finished", "seeds"),
    [
        (1, {}, [[1, 2, 3, 4, 5]]),
        (2, {}, [[1, 2, 3], [4, 5]]),
        (4, {}, [[1, 2], [3], [4], [5]]),
        (8, {}, [[1], [2], [3], [4], [5]]),
        (2, {1, 2, 3}, [[1, 2, 3, 4], [5]]),
        (2, {2, 4}, [[1, 2, 3], [4, 5]]),
        (3, {1, 2, 3, 4, 5}, [[1, 2, 3, 4, 5]]),
    ],
)
def test_what_is_to_do_of_a_series_is_shared_among_the_jobs(tmp_path: Path, jobs: int, finished, seeds) -> None:
    plan, _ = make_project(tmp_path, FINISH, seeds=[1, 2, 3, 4, 5], compact=True)
    done = {config.run for config in plan.runs if config.seed in finished}
    series = plans._errands(plan.runs, Options(jobs=jobs), done)
    assert [[config.seed for config in part] for part in series] == seeds


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_job_takes_the_branches_of_a_run_after_it_and_waits_for_no_other(jobs: int) -> None:
    plan = load_plan("runs/plans/ladder-h200.yaml").only(["7M-*", "13M-bf16-s1-d5"])
    errands = plans._errands(plan.runs, Options(jobs=jobs), set())
    assert [[config.run for config in errand] for errand in errands] == [
        *(
            [f"7M-{recipe}-s1", f"7M-{recipe}-s1-d5", f"7M-{recipe}-s1-d10"]
            for recipe in ("bf16", "tensorwise", "fused")
        ),
        ["13M-bf16-s1-d5"],
        *([f"7M-{recipe}-s1"] for recipe in ("rowwise", "rowwise_with_gw_hp")),
    ]


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FINISH)
    unsuccessful, _ = execute(plan, workspace, jobs=2)
    assert unsuccessful == 0
    folders = [workspace.record(config) for config in plan.runs]
    assert [records.read(folder).status for folder in folders] == ["finished", "finished"]
    provenance = records.read(folders[0]).provenance
    assert provenance.concurrent_runs == 2
    assert provenance.command == command_line()
    before = [(folder / "train.ipynb").stat().st_mtime_ns for folder in folders]
    unsuccessful, output = execute(plan, workspace)
    assert unsuccessful == 0
    assert output.count("already finished") == 2
    assert [(folder / "train.ipynb").stat().st_mtime_ns for folder in folders] == before


@pytest.mark.usefixtures("instantly")
def test_a_changed_configuration_does_not_pass_for_the_old_result(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FINISH)
    execute(plan, workspace, jobs=2)
    plan.path.write_text(plan.path.read_text().replace("0.001", "0.002"))
    changed = load_plan(plan.path)
    for config in plan.runs:
        records.share_tables(workspace.records, "p", config.run)
    with pytest.raises(UserError, match=r"optimizer changed.*--replace"):
        execute(changed, workspace)
    assert len(records.read_table(workspace.records / "p", "metrics")) == 2
    assert execute(changed, workspace, replace=True, jobs=2)[0] == 0
    record = records.read(workspace.record(changed.runs[0]))
    assert isinstance(record, records.TrainRecord)
    assert record.config["optimizer"]["peak_learning_rate"] == 0.002
    # What the new runs have they have not shared: there it would still be the old ones'.
    assert records.read_table(workspace.records / "p", "metrics").empty


@pytest.mark.usefixtures("instantly")
@pytest.mark.parametrize(
    ("sha256", "epochs", "changed"), [("new", 0.5, "data"), ("old", 0.25, "weights"), ("old", 0.5, None)]
)
def test_data_that_changed_since_do_not_pass_for_what_a_run_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str, epochs: float, changed: str | None
) -> None:
    plan, workspace = make_project(tmp_path, FINISH)
    execute(plan, workspace, jobs=2)
    path = workspace.record(plan.runs[0]) / "record.json"
    record = json.loads(path.read_text())
    record["provenance"] |= {"data_sha256": "old", "epochs": {"edu": 0.5}}
    path.write_text(json.dumps(record))
    monkeypatch.setattr(plans, "_dataset", lambda *_, **__: SimpleNamespace(sha256=sha256))
    monkeypatch.setattr(plans, "Loader", lambda *_, **__: SimpleNamespace(epochs=lambda _: {"edu": epochs}))
    if changed is None:
        assert execute(plan, workspace)[1].count("already finished") == len(plan.runs)
        return
    with pytest.raises(UserError, match=f"the mixture's {changed} changed.*--replace"):
        execute(plan, workspace)
    assert execute(plan, workspace, replace=True, jobs=2)[0] == 0
    assert records.read(workspace.record(plan.runs[0])).provenance.data_sha256 is None, "made anew"


@pytest.mark.usefixtures("instantly")
def test_fields_that_change_no_result_or_are_newer_than_a_record_do_not_make_it_another(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FINISH)
    execute(plan, workspace, jobs=2)
    path = workspace.record(plan.runs[0]) / "record.json"
    record = json.loads(path.read_text())
    del record["config"]["high_precision"], record["config"]["optimizer"]["z_loss"]
    record["config"] |= {"checkpoint_interval": 7, "a_field_of_old": 1}
    path.write_text(json.dumps(record))
    assert "already finished" in execute(plan, workspace)[1]


@pytest.mark.usefixtures("instantly")
@pytest.mark.parametrize(
    ("asked", "found", "again"),
    [
        ("full", {"config": {"suite": "demo", "precision": "bf16"}}, True),
        ("full", {"config": {"suite": "full", "precision": "tensorwise"}}, True),
        ("full", {"config": {"suite": "full", "precision": "bf16"}}, False),
        ("demo", {"config": {"suite": "demo", "precision": "bf16"}}, False),
        # The demo's seconds of work do not replace the full suite's hours.
        ("demo", {"config": {"suite": "full", "precision": "bf16"}}, False),
        ("none", {"config": {"suite": "demo", "precision": "bf16"}}, False),
        # Older scores do not say what they were made with.
        ("full", {"config": {"limit": None}}, False),
        ("full", {}, False),
    ],
)
def test_a_run_is_scored_again_where_its_plan_asks_for_other_scores(
    tmp_path: Path, asked: str, found: dict[str, object], again: bool
) -> None:
    plan, workspace = make_project(tmp_path, FINISH, seeds=[1], evaluation=asked)
    folder = write_finished(plan, workspace)
    (folder / "eval.json").write_text(json.dumps({"results": {}} | found))
    unsuccessful, output = execute(plan, workspace)
    assert unsuccessful == 0
    assert (folder / "evaluate.ipynb").exists() == again
    assert ("already finished" in output) == (not again)


def test_why_scoring_failed_is_printed_and_a_path_on_one_line(tmp_path: Path) -> None:
    raises = "raise RuntimeError('out of cheese')"
    plan, workspace = make_project(tmp_path, raises, "evaluate", seeds=[1], evaluation="demo")
    notebook = write_finished(plan, workspace) / "evaluate.ipynb"
    says = f"scoring failed: RuntimeError: out of cheese; see {notebook}\n"
    assert execute(plan, workspace) == (1, f"p 1/1 t-bf16-s1: {says}")
    work = workspace.work(plan.runs[0])
    (work / "config.json").write_text(plan.runs[0].model_dump_json())
    output = io.StringIO()
    assert not evaluate_run(work, workspace, "demo", None, None, Console(file=output, width=40))
    assert output.getvalue() == f"p t-bf16-s1: {says}"


def test_the_pilots_records_are_those_of_its_plan() -> None:
    plan, workspace = load_plan("runs/plans/pilot-h200.yaml"), Workspace()
    _, output = execute(plan, workspace)
    assert output.count("already finished") == len(plan.runs)


def test_a_branch_waits_for_the_run_that_it_leaves(tmp_path: Path) -> None:
    wait = "import time\nif config.parent is None: time.sleep(2)\n"
    wait += "else: assert (Path(records_dir) / config.plan / config.parent.run / 'record.json').exists()"
    plan, workspace = make_project(tmp_path, wait + FINISH)
    entry = yaml.safe_load(plan.path.read_text())
    entry["entries"][0] |= {"seeds": [1], "tokens": 640, "schedule": {"kind": "wsd"}, "decay_branches_at": [0.02]}
    plan.path.write_text(yaml.safe_dump(entry))
    branched = load_plan(plan.path)
    assert [config.run for config in branched.runs] == ["t-bf16-s1", "t-bf16-s1-d0.02"]
    assert execute(branched, workspace, jobs=2)[0] == 0


def test_a_failed_notebook_leaves_its_failure_and_a_record(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FAIL)
    unsuccessful, output = execute(plan, workspace, jobs=2)
    assert unsuccessful == 2
    record = records.read(workspace.record(plan.runs[0]))
    assert record.status == "failed"
    assert "out of cheese" in (record.reason or "")
    assert "out of cheese" in (workspace.record(plan.runs[0]) / "train.ipynb").read_text()
    assert "t-bf16-s1: failed" in output


def test_a_record_tells_why_the_last_attempt_failed_not_the_one_before(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FAIL)
    config = plan.runs[0]
    plan = plan.model_copy(update={"runs": (config,)})
    record = records.started(config, collect_provenance("CPU"), emulated=False)
    record.status, record.reason = "interrupted", "SIGTERM after step 1; the same command resumes"
    records.write(record, workspace.records)
    notebook = workspace.root / "runs" / "train.ipynb"
    notebook.write_text(notebook.read_text().replace("records.write(record, Path(records_dir))", "pass"))
    assert execute(plan, workspace)[0] == 1
    after = records.read(workspace.record(config))
    assert after.status == "failed"
    assert "out of cheese" in (after.reason or "")


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FINISH)
    with ExitStack() as locks:
        for config in plan.runs:
            locks.enter_context(checkpoint.lock(workspace.work(config)))
        unsuccessful, output = execute(plan, workspace, jobs=2)
    assert unsuccessful == len(plan.runs)
    assert "another process is training it" in output
    assert not workspace.records.exists()
    assert [path.name for path in workspace.work(plan.runs[0]).iterdir()] == [".lock"]


@pytest.fixture
def running(tmp_path: Path) -> tuple[Path, Callable[..., tuple[str, str]]]:
    """A run whose record says that it is running: its folder, and what status says of it after some news."""
    plan, workspace = make_project(tmp_path, FINISH, seeds=[1])
    record = records.started(plan.runs[0], collect_provenance("CPU"), emulated=False)
    record.status = "running"
    records.write(record, workspace.records)
    work = workspace.work(plan.runs[0])
    work.mkdir(parents=True)

    def status_after(**news: object) -> tuple[str, str]:
        progress = Progress(**{"stage": "training", "step": 3, "steps": 9} | news)  # type: ignore[arg-type]
        ProgressFile(work).update(lambda: progress, now=True)
        (row,) = status_rows(plan, workspace.records, workspace.checkpoints)
        return row[2], row[6]

    return work, status_after


def test_a_run_is_running_while_its_folder_is_locked_whoever_has_its_process_number(running) -> None:
    work, status_after = running
    # This process is alive, and trains nothing.
    assert status_after(pid=os.getpid()) == ("stopped", "the same command resumes it")
    with checkpoint.lock(work):
        assert status_after() == ("running", "training 3/9")
    assert status_after(stage="starting", step=0) == ("running", "starting 0/9")


def test_a_run_on_another_machine_is_judged_by_the_age_of_its_news(running) -> None:
    work, status_after = running
    with subprocess.Popen(["true"]) as process:
        process.wait()
    elsewhere = {"host": "node7", "pid": process.pid}

    def ago(**since: float) -> datetime:
        return datetime.now(UTC) - timedelta(**since)

    status, detail = status_after(**elsewhere, updated_utc=ago(seconds=90))
    assert (status, detail[:-6]) == ("running", "training 3/9, on node7, last heard of 0:01:")
    assert status_after(**elsewhere, updated_utc=ago(hours=5))[0] == "silent"
    # Its clock may be ahead of this machine's.
    assert "0:00:00 ago" in status_after(**elsewhere, updated_utc=ago(hours=-1))[1]
    with checkpoint.lock(work):
        assert status_after(**elsewhere, updated_utc=ago(hours=5))[0] == "running"


def test_a_killed_kernel_leaves_a_failed_record(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, DIE)
    assert execute(plan, workspace, jobs=2)[0] == 2
    assert records.read(workspace.record(plan.runs[0])).status == "failed"


def test_compact_runs_share_a_process_and_one_that_kills_it_stops_no_other(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, SERIES, "series", seeds=[1, 2, 3], compact=True)
    unsuccessful, output = execute(plan, workspace)
    assert unsuccessful == 1
    statuses = [records.read(workspace.record(config)).status for config in plan.runs]
    assert statuses == ["finished", "failed", "finished"]
    # The first process trained two runs, the second one the rest; records keep no notebook.
    notebooks = sorted(path.parent.name for path in workspace.checkpoints.rglob("*.ipynb"))
    assert notebooks == [plan.runs[0].run, plan.runs[2].run]
    assert not list(workspace.records.rglob("*.ipynb"))
    assert "t-bf16-s2: failed: " in output
    assert output.count("finished, ") == 2


@pytest.mark.usefixtures("instantly")
def test_compact_runs_of_several_gpus_keep_their_record_alone(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, FINISH, compact=True)
    assert execute(plan, workspace, nproc=2)[0] == 0
    kept = sorted(str(path.relative_to(workspace.records)) for path in workspace.records.rglob("*") if path.is_file())
    assert kept == ["p/metrics.parquet", "p/t-bf16-s1/record.json", "p/t-bf16-s2/record.json"]


def test_a_second_signal_ends_a_worker_that_is_slow_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, workspace = make_project(tmp_path, FINISH, seeds=[1])
    script = (
        "import signal, sys, time; from pathlib import Path\n"
        "def slow(number, frame): signal.signal(number, signal.SIG_DFL); Path('stopping').touch()\n"
        "signal.signal(signal.SIGTERM, slow); Path('started').touch(); time.sleep(60); time.sleep(60)\n"
    )
    monkeypatch.setattr(
        stage.Stage, "_start", lambda *_: subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    )

    def interrupt() -> None:
        for mark in ("started", "stopping"):
            while not (tmp_path / mark).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(StageInterrupted) as stopped:
        execute(plan, workspace)
    assert stopped.value.exit_code == 130


def test_a_signal_stops_the_worker_at_a_checkpoint_and_starts_no_other(tmp_path: Path) -> None:
    plan, workspace = make_project(tmp_path, STOP_ON_SIGNAL)
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from fp8lab.plan import load_plan; from fp8lab.running.plans import Options, run_plan\n"
        "from fp8lab.running.stage import StageInterrupted; from fp8lab.running.workspace import Workspace\n"
        f"root = Path({str(tmp_path)!r})\n"
        "workspace = Workspace(root, root / 'records', root / 'data', root / 'checkpoints')\n"
        "try: run_plan(load_plan(root / 'runs/plans/p.yaml'), workspace, Options(), Console())\n"
        "except StageInterrupted as interruption: sys.exit(interruption.exit_code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    progress = workspace.work(plan.runs[0]) / "progress.json"
    deadline = time.monotonic() + 60
    try:
        while not progress.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert status_rows(plan, workspace.records, workspace.checkpoints)[1][2] == "to do"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert records.read(workspace.record(plan.runs[0])).status == "interrupted"
    assert not (workspace.record(plan.runs[1]) / "record.json").exists()
