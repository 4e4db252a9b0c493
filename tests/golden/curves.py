"""The golden loss curves: 100 steps of a tiny model for each recipe, on tokens made by a rule.

Processors sum in different orders, a BF16 or FP8 number that falls on the other side of a rounding boundary
is off by up to 1/16, and training spreads it: on two processors the losses part by 1e-3 within ten steps.
So the curves are computed in `PORTABLE` arithmetic, which is slow and the same on every x86-64.

``python -m tests.golden.curves`` writes them again. Do that only for a change that is meant to change the
numbers, and say so in the commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fp8lab import cpu, records
from fp8lab.config import RECIPES, RunConfig
from fp8lab.training import trainer
from tests import rule_data
from tests.rule_data import tiny_config

FOLDER = Path(__file__).parent
TORCH = "2.13"
"""Version of torch that computed the stored curves: another rounds elsewhere, and parts from them sooner."""
STEPS = 100
PORTABLE = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Environment in which torch and its libraries use no instruction that some x86-64 lacks."""


def golden_config(recipe: str) -> RunConfig:
    """The run behind the curve of `recipe`."""
    return tiny_config(
        run=recipe,
        recipe=recipe,
        tokens=STEPS * 256,
        global_batch_tokens=256,
        micro_batch=8,
        optimizer={"peak_learning_rate": 4e-3},
        schedule={"warmup_fraction": 0.1},
        checkpoint_interval=STEPS,
    )


def write_curves(folder: Path) -> None:
    """Compute every curve in a process with portable arithmetic, and write ``<recipe>.json`` into `folder`."""
    subprocess.run(
        [sys.executable, "-m", "tests.golden.curves", str(folder)],
        cwd=FOLDER.parents[1],
        env=os.environ | PORTABLE,
        check=True,
    )


def read_curve(folder: Path, recipe: str) -> list[float]:
    """Training loss of each step, in nats a token."""
    losses: list[float] = json.loads((folder / f"{recipe}.json").read_text())["losses"]
    return losses


def _compute(folder: Path) -> None:
    trainer.open_data = rule_data.open_data  # type: ignore[assignment]
    # The way of processors without BF16 instructions is open to all.
    cpu.multiplies_bf16 = lambda: False  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: Path(scratch, name) for name in ("records_dir", "data_dir", "checkpoints_dir")}
        for recipe in RECIPES:
            trainer.train(golden_config(recipe), **places)
            table = records.read_table(places["records_dir"] / "test" / recipe, "metrics")
            content = {"recipe": recipe, "losses": table["loss"].round(7).tolist()}
            (folder / f"{recipe}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _compute(Path(sys.argv[1]))
    else:
        write_curves(FOLDER)
