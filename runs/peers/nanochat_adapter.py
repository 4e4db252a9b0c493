"""nanochat's Float8Linear in place of the blocks' Linears.

It is no package: the environment variable NANOCHAT names a checkout of github.com/karpathy/nanochat, and the record
keeps its commit. Only ``nanochat/fp8.py`` and what it imports are used.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from fp8lab.errors import UserError
from fp8lab.model import GPT

VARIABLE = "NANOCHAT"
COMMIT_FILE = "COMMIT"
"""Where a checkout has no .git, a file with its commit."""


def version() -> str:
    """What was measured, for the record: the checkout's commit, marked where files differ from it."""
    folder = _folder()
    if (folder / COMMIT_FILE).exists():
        commit = (folder / COMMIT_FILE).read_text().strip()
    elif Path(_git(folder, "rev-parse", "--show-toplevel")) == folder.resolve():
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        commit = _git(folder, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    else:
        # Inside another project's repository, or in none.
        commit = ""
    return f"nanochat {commit or 'of unknown commit'}"


def _git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=False).stdout.strip()


def convert(model: GPT, recipe: str) -> None:
    """Swap the Linears of `model`'s blocks; its head is tied and stays BF16."""
    _fp8().convert_to_float8_training(model.blocks)


def _folder() -> Path:
    folder = Path(os.environ.get(VARIABLE, ""))
    if not (folder / "nanochat" / "fp8.py").exists():
        raise UserError(f"{VARIABLE}: should name a checkout of nanochat, with nanochat/fp8.py in it")
    return folder


def _fp8() -> ModuleType:
    path = str(_folder())
    if path not in sys.path:
        sys.path.append(path)
    return importlib.import_module("nanochat.fp8")
