"""Where and with what a result is made: commit, command, device and versions, for its record."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import re
import shlex
import string
import subprocess
import sys
import tokenize
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fp8lab.config import FusedConfig
from fp8lab.records import KERNELS, Provenance

VERSIONED_PACKAGES = (
    "fp8lab",
    "torch",
    "torchao",
    "triton",
    "numpy",
    "tiktoken",
    "datasets",
    "lm_eval",
    "transformers",
)
_KERNEL_MODULES = ("attention", "block", "head", "operations", "scaling", "triton_ops")


@functools.cache
def _kernels_version(folder: Path) -> str:
    """A hash of what `fused` and the FP8 head run by default: the code without its comments, and the numerics."""
    code = "".join(_code((folder / f"{module}.py").read_bytes()) for module in _KERNEL_MODULES)
    return hashlib.sha256((code + FusedConfig().model_dump_json()).encode()).hexdigest()[:12]


def _code(source: bytes) -> str:
    """A module's tokens, without comments and the strings that stand for themselves: docstrings."""
    layout = (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL)
    tokens = [token for token in tokenize.tokenize(io.BytesIO(source).readline) if token.type not in layout]
    kept, before = [], tokenize.NEWLINE
    for token, after in itertools.pairwise(tokens):
        begins = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        is_docstring = token.type == tokenize.STRING and begins and after.type == tokenize.NEWLINE
        if token.type != tokenize.NEWLINE and not is_docstring:
            kept += _parts(token)
        before = token.type
    return " ".join(kept)


def _parts(token: tokenize.TokenInfo) -> list[str]:
    """The token; of an f-string the tokens that it is from Python 3.12 on, so that every Python finds the same hash.

    Only of one whose fields are names, as those of the kernels are.
    """
    found = re.fullmatch(r"([fF](\"\"\"|'''|\"|'))(.*)\2", token.string, re.DOTALL)
    if token.type != tokenize.STRING or found is None:
        return [token.string]
    begin, end, text = found.groups()
    parts = [begin]
    for literal, field, _, _ in string.Formatter().parse(text):
        parts += [literal] if literal else []
        parts += ["{", field, "}"] if field is not None else []
    return [*parts, end]


def collect_provenance(device_name: str, device_count: int = 1, host_count: int = 1) -> Provenance:
    """Where and with what a result is being made; `ended_utc` is for the writer to update.

    The commit is the environment's FP8LAB_COMMIT where the machine that runs has no repository. What started this
    process leaves its own command line in FP8LAB_COMMAND, and in FP8LAB_CONCURRENT_RUNS how many share its GPUs.
    """
    commit, dirty = _git_state()
    now = utc_now()
    versions = {"python": sys.version.split()[0]}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions[KERNELS] = _kernels_version(Path(__file__).parent / "kernels")
    return Provenance(
        git_commit=commit,
        git_dirty=dirty,
        started_utc=now,
        ended_utc=now,
        command=os.environ.get("FP8LAB_COMMAND") or command_line(),
        device_name=device_name,
        device_count=device_count,
        host_count=host_count,
        versions=versions,
        concurrent_runs=int(os.environ.get("FP8LAB_CONCURRENT_RUNS", "1")),
    )


def cpu_name() -> str:
    """What records call the processor of this machine."""
    return f"CPU, {os.cpu_count()} cores"


def command_line() -> str:
    """The command that this process was started with; the program without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def utc_now() -> str:
    """The time now, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_state() -> tuple[str, bool]:
    def git(*arguments: str) -> str:
        # This code's repository, whatever folder it is used from.
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Records themselves change while runs go on: they do not make the code dirty.
        code = (":(top)", ":(top,exclude)runs/records")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", *code))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FP8LAB_COMMIT", "unknown"), False
