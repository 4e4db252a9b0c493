"""What this machine can do, and what follows from it."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from fp8lab.provenance import VERSIONED_PACKAGES
from fp8lab.publish import find_quarto


class Finding(NamedTuple):
    what: str
    found: str
    consequence: str


def findings(data_dir: Path) -> list[Finding]:
    """Everything `fp8lab doctor` prints, in order."""
    return [_processor(), _fp8(), _compiler(), _versions(), _quarto(), _hub(), _data(data_dir)]


def _processor() -> Finding:
    if not torch.cuda.is_available():
        return Finding("device", f"CPU, {os.cpu_count()} cores", "the demo plan runs here; the others want a GPU")
    names = ", ".join(
        f"{torch.cuda.get_device_name(index)} ({torch.cuda.get_device_properties(index).total_memory / 1e9:.0f} GB)"
        for index in range(torch.cuda.device_count())
    )
    return Finding("device", names, "plans with micro-batches for 80 GB fit an H100 or H200")


def _fp8() -> Finding:
    from fp8lab.precision import fp8_tensor_cores

    if fp8_tensor_cores():
        return Finding("FP8", "tensor cores", "recipes run in FP8 and their speed counts")
    return Finding("FP8", "no tensor cores", "recipes are emulated: their losses count, their speed does not")


def _compiler() -> Finding:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Finding("C++ compiler", compiler, "torch.compile works on the CPU")
    return Finding("C++ compiler", "none", "runs on the CPU are not compiled, and slower")


def _versions() -> Finding:
    found = []
    for package in VERSIONED_PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return Finding("versions", ", ".join(found), "recorded with every run")


def _quarto() -> Finding:
    quarto = find_quarto()
    if quarto:
        return Finding("Quarto", quarto, "`quarto render` publishes the article")
    return Finding("Quarto", "none", "`fp8lab publish` publishes a plainer edition through pandoc")


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if offline:
        return Finding("Hugging Face hub", "HF_HUB_OFFLINE is set", "use local mixtures and --eval-data")
    return Finding("Hugging Face hub", "not asked", "mixture 'article' and lm-eval's tasks download from it")


def _data(data_dir: Path) -> Finding:
    built = sorted(path.parent.name for path in data_dir.glob("*/manifest.json"))
    if built:
        return Finding("data", f"built in {data_dir}: {', '.join(built)}", "verified when a run opens it")
    return Finding("data", f"nothing built in {data_dir}", "`fp8lab run` builds what a plan needs")
