"""The Slurm script, with stand-ins for Slurm's commands and for what it starts on the nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fp8lab import records
from fp8lab.config import RunConfig
from fp8lab.plan import load_plan
from fp8lab.provenance import collect_provenance
from tests.conftest import ROOT

SCRIPT = ROOT / "runs" / "slurm" / "article.sbatch"
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>srun.log
if [ -e "stop-in-${!#}" ]; then
  trap 'sleep 0.1; touch checkpoint; exit 143' TERM
  touch started
  while true; do sleep 0.05; done
fi
[ ! -e "fail-${!#}" ]
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] && printf 'node1\\nnode2\\n'
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A plan of three runs, the second of them finished, and the commands that the script calls."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
    ):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    model = {"name": "t", "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "vocab_size": 64, "seq_len": 16}
    sizes = {"tokens": 64, "global_batch_tokens": 32, "micro_batch": 2, "optimizer": {"peak_learning_rate": 0.001}}
    entry = {"models": [model], "recipes": ["bf16"], "seeds": [1, 2, 3], "mixture": "demo"} | sizes
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"name": "p", "description": "d", "entries": [entry]}))
    finish(load_plan(path).runs[1], tmp_path)
    return tmp_path


def finish(config: RunConfig, project: Path) -> None:
    record = records.started(config, collect_provenance("CPU"), emulated=False)
    record.status = "finished"
    records.write(record, project / "runs" / "records")


def submit(project: Path, **variables: str) -> subprocess.Popen[str]:
    """Start the script as a job of two nodes."""
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "PLAN": "plan.yaml"}
    path = f"{project / '.venv' / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **slurm, **variables}
    return subprocess.Popen(
        ["bash", SCRIPT],
        cwd=project,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        # Tests that run in a shell's background inherit an ignored SIGINT, and what bash inherits so it cannot trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def started(project: Path) -> list[str]:
    """What the script had started on the nodes."""
    return (project / "srun.log").read_text().splitlines()


DATA = "--nodes=1 --ntasks=1 fp8lab data build demo"
TRAIN = [
    f"torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node1:29500 --rdzv-id=7-{run} "
    f"-m fp8lab.training.trainer plan.yaml {run}"
    for run in ("t-bf16-s1", "t-bf16-s3")
]


def test_the_script_builds_the_data_trains_what_is_not_finished_and_scores(project: Path) -> None:
    job = submit(project, EVAL_DATA="items")
    assert job.communicate(timeout=60) == (None, "")
    assert job.returncode == 0
    assert started(project) == [
        f"{DATA} --eval-data items",
        *TRAIN,
        "--nodes=1 --ntasks=1 fp8lab run plan.yaml --eval-data items",
    ]


@pytest.fixture
def listed(project: Path) -> Path:
    """The same project, whose python answers at once what the script asks of it."""
    (project / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho 'data demo\ntrain t-bf16-s1\ntrain t-bf16-s3'\n")
    return project


def test_a_run_that_fails_stops_no_other_and_the_job_says_so(listed: Path) -> None:
    (listed / "fail-t-bf16-s1").touch()
    job = submit(listed)
    job.communicate(timeout=60)
    assert job.returncode == 1
    assert started(listed) == [DATA, *TRAIN]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_checkpoint_waited_for(listed: Path, number: signal.Signals) -> None:
    (listed / "stop-in-t-bf16-s1").touch()
    job = submit(listed)
    while not (listed / "started").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode == 143
    assert (listed / "checkpoint").exists()
    assert started(listed) == [DATA, TRAIN[0]]
