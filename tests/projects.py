"""Small projects: the article's sources beside made-up records."""

from __future__ import annotations

import shutil
from pathlib import Path

from fp8lab.config import ModelConfig
from tests.fixtures import (
    DEFAULT,
    SIZES,
    Measured,
    write_benchmark_records,
    write_demo_records,
    write_early_records,
    write_gpu_records,
    write_map_records,
    write_numerics_records,
    write_reliability_records,
    write_scaling_out_records,
    write_speed_records,
    write_variance_records,
)

ROOT = Path(__file__).parents[1]


def copy_sources(root: Path) -> None:
    """The chapters, and what they read beside records."""
    for name in ("index.ipynb", "_quarto.yml", "references.bib"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "chapters", root / "chapters")
    for name in ("plans", "mixtures"):
        shutil.copytree(ROOT / "runs" / name, root / "runs" / name)


def write_every_kind(records_dir: Path, measured: Measured = DEFAULT, sizes: tuple[ModelConfig, ...] = SIZES) -> Path:
    """Records of every kind that the article draws, the demo's and a GPU's; returns their folder."""
    write_demo_records(records_dir, sizes=sizes, measured=measured)
    write_gpu_records(records_dir, sizes=sizes, measured=measured)
    write_early_records(records_dir, sizes[-1], measured=measured)
    write_scaling_out_records(records_dir, sizes[-1], measured=measured)
    write_speed_records(records_dir, trained=sizes[-1], measured=measured)
    write_map_records(records_dir, measured=measured)
    write_benchmark_records(records_dir, measured=measured)
    write_variance_records(records_dir, sizes[0], measured=measured)
    write_numerics_records(records_dir, sizes[0], measured=measured)
    write_reliability_records(records_dir, measured=measured)
    return records_dir


def make_project(root: Path, measured: Measured = DEFAULT, sizes: tuple[ModelConfig, ...] = SIZES) -> Path:
    """A project with the article's sources and small records; returns the folder of records."""
    copy_sources(root)
    return write_every_kind(root / "runs" / "records", measured, sizes)
