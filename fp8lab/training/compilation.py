"""torch.compile, block by block, and what a process has compiled so far."""

from __future__ import annotations

import logging
import shutil
import sysconfig
from pathlib import Path

import torch

from fp8lab.config import RunConfig
from fp8lab.model import GPT

log = logging.getLogger(__name__)


def compile_blocks(model: GPT, device: torch.device) -> bool:
    """torch.compile each block and the final norm: blocks share a graph, so it takes seconds, not minutes.

    Returns:
        False where nothing can be compiled, after a warning.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if device.type == "cpu" and not (compiler and Path(sysconfig.get_path("include"), "Python.h").exists()):
        log.warning("no C++ compiler (g++ or clang++) or no Python headers: the run is not compiled")
        return False
    for block in model.blocks:
        block.compile(dynamic=False)
    model.norm.compile(dynamic=False)
    return True


_compiled_for = ""


def drop_other_graphs(config: RunConfig) -> None:
    """Drop what this process has compiled, unless it was for a run with the same graphs as `config`'s.

    A run that differs in seed alone then compiles nothing. Graphs of other runs would count against the limit of
    recompilations.
    """
    global _compiled_for
    shape = {"model", "recipe", "head", "fused", "high_precision", "micro_batch", "activation_checkpointing"}
    graphs = config.model_dump_json(include=shape)
    if graphs != _compiled_for:
        torch.compiler.reset()
        _compiled_for = graphs
