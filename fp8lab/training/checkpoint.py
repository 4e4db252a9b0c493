"""Checkpoints that survive what really happens, and the final weights.

A run's folder ``<checkpoints_dir>/<plan>/<run>/`` holds::

    step-00000500/            resumable state after 500 steps
        model.safetensors         FP32 weights, and the precision recipe's buffers
        optimizer.safetensors     AdamW's moments and step counts
        trainer.safetensors       the step guard's history
        metrics.parquet, validation.parquet, health.parquet   every row so far
        state.json                step, elapsed seconds, the run's configuration
        checksums.json            SHA-256 and size of every file above
    step-00001000/            the same of a run sharded over several ranks
        shard-00001-….safetensors    the first rank's share of the same tensors; one file a rank
        …                         tables, state.json and checksums.json as above
    model.safetensors         the trained weights
    config.json               the run's configuration

A checkpoint is written under a temporary name, each file and the folder are synced to disk, and only
then is it renamed: it is there whole or not at all. On resuming, the newest checkpoint whose checksums
hold is used, and each damaged one is reported. Where there are checkpoints but none is whole, the run
is refused and nothing is overwritten. Tensors are safetensors, tables are parquet, the rest is JSON:
opening one executes nothing.

Shards are written and read by torch.distributed.checkpoint, through its safetensors storage: its own format keeps
its index in a pickle, this one in the files' headers. It reads both kinds of checkpoint alike, each rank what it
needs of them, so that a run goes on with any number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import warnings
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fp8lab.config import RunConfig, read_run_config
from fp8lab.data import TokenDataset, load_mixture
from fp8lab.data.loader import check_tokenizer
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.progress import LOCK_FILE_NAME
from fp8lab.records import TRAINING_TABLES, write_atomically
from fp8lab.training import distributed
from fp8lab.training.distributed import ALONE, World

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
TOKENIZER_KEY = "tokenizer_sha256"
"""In the header of the final weights."""
CONFIG_FILE = "config.json"
CHECKSUMS_FILE = "checksums.json"
PARTS = ("model", "optimizer", "trainer")
HISTORY_FILES = (*(f"{name}.parquet" for name in TRAINING_TABLES), "state.json")
LOCK_SECONDS = 1.0
"""How long a lock is asked for before it counts as another process's."""
KEEP = 2
"""Resumable checkpoints kept beside those to keep: the newest, and the one to fall back on if it is damaged."""


@dataclass
class History:
    """How far a run has come."""

    step: int
    metrics: pd.DataFrame
    validation: pd.DataFrame
    health: pd.DataFrame
    facts: dict[str, Any]
    """JSON: the configuration, data hashes, elapsed seconds."""


@dataclass
class TrainingState(History):
    """Everything that a run continues from. No two tensors have the same name."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    trainer: dict[str, Tensor]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; a dead owner's lock is gone with it.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE_NAME).open("a+") as file:
        if not _is_acquired(file):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"{folder}: process {owner} is training this run; wait for it or stop it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _is_acquired(file: TextIO) -> bool:
    """Whether the lock could be had: whoever only asks whether it is held has it for an instant (`is_locked`)."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_SECONDS / 20)
        else:
            return True


class CheckpointWriter:
    """Writes a run's checkpoints in the background, one at a time.

    `save` queues copies of the state to the host and returns. Where the write before has failed, it writes the
    newer state before it returns, and raises only where that fails too: a full disk may have room again. A checkpoint
    that is to be kept has no substitute: the run that resumes from the one before comes by it once more.
    """

    def __init__(self, folder: Path, keep_at: Collection[int] = (), world: World = ALONE) -> None:
        """
        Args:
            folder: the run's folder.
            keep_at: the checkpoints after these steps are never removed.
            world: the ranks that the state is sharded over, each with a writer; they agree in the background.
        """
        self._folder = folder
        self._keep_at = keep_at
        self._world = world
        self.write_seconds = 0.0
        """What the last write took in the background."""
        self._host = _HostMemory()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0

    @property
    def has_failed(self) -> bool:
        """True if the last write has ended in an error that nobody has been told of."""
        return self._error is not None

    def save(self, state: TrainingState) -> None:
        """Snapshot `state` and start writing it; first waits for the write before.

        Raises:
            OSError: the write before failed, and this one too or the one before has no substitute.
        """
        is_second_try = self._wait_or_warn()
        self._step = state.step
        snapshot = dataclasses.replace(
            state,
            model=self._host.copy("model", state.model),
            optimizer=self._host.copy("optimizer", state.optimizer),
            trainer=self._host.copy("trainer", state.trainer),
        )
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()
        if is_second_try:
            self.wait()

    def _wait_or_warn(self) -> bool:
        """Wait for the write under way; True if it failed and a newer state will do in its place."""
        try:
            self.wait()
        except OSError as error:
            # Ranks that write a checkpoint together may still be at the one that failed.
            if self._world.size > 1 or self._step in self._keep_at:
                raise
            log.warning("a checkpoint could not be written: %s; the state as it is now is tried instead", error)
            return True
        return False

    def wait(self) -> None:
        """Wait for the write under way.

        Raises:
            OSError: it failed, for example because the disk is full; earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: TrainingState) -> None:
        try:
            self._host.wait()
            began = time.perf_counter()
            write(self._folder, state, self._world)
            self.write_seconds = time.perf_counter() - began
            if self._world.leads:
                _remove_old(self._folder, self._keep_at)
        except BaseException as error:
            self._error = error


class _HostMemory:
    """Copies of tensors in host memory, in buffers that are allocated once: page-locking gigabytes takes seconds.

    A GPU's copies are queued in the stream that trains, so the next step overwrites nothing before it is
    copied, and the host goes on at once. They hold what they should only after `wait`.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies of `tensors`, in the buffers that `part` has had before."""
        copies = {}
        for name, tensor in tensors.items():
            share = distributed.local(tensor.detach())
            copy = self._buffer((part, name), share).copy_(share, non_blocking=True)
            copies[name] = distributed.on_host(tensor, copy)
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies have arrived."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer


def write(folder: Path, state: TrainingState, world: World = ALONE) -> Path:
    """Write one checkpoint; it appears under its name only when all of it is on disk.

    Args:
        folder: the run's folder.
        state: what to write; of several ranks, each rank's shares.
        world: the ranks that write together.

    Raises:
        OSError: writing failed; the temporary folder is removed and nothing else has changed.
    """
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"

    def begin() -> bool:
        if final.exists() and find_damage(final) is None:
            return False
        _remove(temporary)
        temporary.mkdir(parents=True)
        return True

    def complete(checksums: dict[str, Any]) -> None:
        written = _write_history(temporary, state)
        checksums |= {path.name: _checksum(path) for path in written}
        (temporary / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2))
        for path in (*written, temporary / CHECKSUMS_FILE, temporary):
            _sync(path)
        _remove(final)
        temporary.rename(final)
        _sync(folder)

    if not world.first(begin):
        return final
    try:
        written = _write_shards(temporary, state, world) if world.size > 1 else _write_parts(temporary, state)
        for path in written:
            _sync(path)
        checksums = world.gather({path.name: _checksum(path) for path in written})
        world.first(lambda: complete(dict(ChainMap(*checksums))))
    except BaseException:
        if world.leads:
            _remove(temporary)
        raise
    return final


def _write_parts(folder: Path, state: TrainingState) -> list[Path]:
    for name in PARTS:
        _save_tensors(getattr(state, name), folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in PARTS]


def _write_shards(folder: Path, state: TrainingState, world: World) -> list[Path]:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    tensors = state.model | state.optimizer | state.trainer
    dcp.save(tensors, storage_writer=writer, process_group=world.group)
    return list(folder.glob(f"shard-{world.rank + 1:05d}-*.safetensors"))


def _write_history(folder: Path, history: History) -> list[Path]:
    for name in TRAINING_TABLES:
        getattr(history, name).to_parquet(folder / f"{name}.parquet", index=False)
    (folder / "state.json").write_text(json.dumps(history.facts | {"step": history.step}))
    return [folder / name for name in HISTORY_FILES]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None where there has never been one.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    problems = []
    for path in reversed(_checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return path
        problems.append(problem)
        log.warning("damaged checkpoint: %s", problem)
    if problems:
        raise UserError(
            f"{folder}: every checkpoint is damaged ({problems[0]}); restore one, or remove the folder to start again"
        )
    return None


def at_step(folder: Path, step: int) -> Path:
    """The checkpoint after `step` steps of the run in `folder`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        kept = ", ".join(map(str, saved_steps(folder))) or "none"
        raise UserError(f"{folder}: no checkpoint after step {step}; there: {kept} (see keep_checkpoints_at)")
    problem = find_damage(path)
    if problem is not None:
        raise UserError(f"damaged checkpoint: {problem}")
    return path


def load_history(path: Path) -> History:
    """How far the run had come at the checkpoint `path`, which is whole."""
    facts = json.loads((path / "state.json").read_bytes())
    tables = {name: pd.read_parquet(path / f"{name}.parquet") for name in TRAINING_TABLES}
    return History(step=facts.pop("step"), facts=facts, **tables)


def load_tensors(path: Path, tensors: dict[str, Tensor], may_lack: Collection[str] = ()) -> None:
    """Fill `tensors`, by name and in place, from the checkpoint `path`, which is whole.

    A rank may ask for shares, whoever wrote the checkpoint, and asks for itself.

    Args:
        path: the checkpoint.
        tensors: what to fill.
        may_lack: names that stay as they are where the checkpoint is from before they were saved.
    """
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    tensors = {name: tensor for name, tensor in tensors.items() if name in saved or name not in may_lack}
    with warnings.catch_warnings():
        # That a single process loads is what is meant.
        warnings.filterwarnings("ignore", "torch.distributed is ", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def find_damage(path: Path) -> str | None:
    """What is wrong with the checkpoint `path` by its checksums, in one line; None if it is whole."""
    try:
        checksums = json.loads((path / CHECKSUMS_FILE).read_bytes())
        expected = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in checksums.items()}
    except OSError:
        return f"{path / CHECKSUMS_FILE} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{path / CHECKSUMS_FILE} cannot be parsed"
    tensors = set(expected) - set(HISTORY_FILES)
    is_known = tensors == {f"{name}.safetensors" for name in PARTS} or tensors == _shard_names(len(tensors))
    if not is_known or not expected.keys() >= set(HISTORY_FILES):
        return f"{path / CHECKSUMS_FILE} lists other files than a checkpoint's"
    if strange := {file.name for file in path.glob("*.safetensors")} - tensors:
        return f"{path / min(strange)} is not in {CHECKSUMS_FILE}"
    for name, (sha256, size) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
        if _checksum(file)["sha256"] != sha256:
            return f"{file} does not match its SHA-256"
    return None


def clean_up(folder: Path) -> None:
    """Remove what a killed process left half-written. Call it while holding the lock."""
    for path in folder.glob(".step-*.tmp"):
        _remove(path)


def discard(folder: Path) -> None:
    """Remove the checkpoints of a finished run that keeps none."""
    for path in _checkpoints(folder):
        _remove(path)


def save_final(folder: Path, model: GPT, config: RunConfig, tokenizer_sha256: str | None = None) -> None:
    """Write the trained weights and the configuration, each atomically; weights first.

    Args:
        tokenizer_sha256: of the tokenizer that the model knows: kept with the weights, for `trained_encoding`.
    """
    parameters = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    temporary = folder / f".{MODEL_FILE}.tmp"
    try:
        _save_tensors(parameters, temporary, {TOKENIZER_KEY: tokenizer_sha256} if tokenizer_sha256 else None)
        _sync(temporary)
        temporary.replace(folder / MODEL_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(folder / CONFIG_FILE, config.model_dump_json(indent=2).encode() + b"\n")


def load_model(run_folder: Path, device: torch.device | str = "cpu") -> tuple[GPT, RunConfig]:
    """A finished run's model, in evaluation mode with FP32 weights and no FP8, and its configuration.

    Raises:
        UserError: a file is missing or damaged, or the weights are not this configuration's.
    """
    config = read_run_config(run_folder / CONFIG_FILE)
    path = run_folder / MODEL_FILE
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    with torch.device(device):
        model = GPT(config.model)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, shape in expected.items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
            raise UserError(f"{path}: {name} {found}; expected {tuple(shape)} by {run_folder / CONFIG_FILE}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{path}: {unknown[0]} is no weight of the model in {run_folder / CONFIG_FILE}")
    model.load_state_dict(tensors, strict=False)
    return model.eval(), config


def trained_encoding(run_folder: Path, config: RunConfig, data_dir: Path) -> tiktoken.Encoding:
    """The tokenizer that a finished run was trained with, from its mixture's data set.

    Raises:
        UserError: the data set is not there, or has another tokenizer by now; weights from before theirs was kept with
            them are taken at their word.
    """
    dataset = TokenDataset.open(load_mixture(config.mixture), data_dir)
    with safe_open(run_folder / MODEL_FILE, "pt") as file:
        trained_with = (file.metadata() or {}).get(TOKENIZER_KEY)
    check_tokenizer(dataset, trained_with, run_folder / MODEL_FILE)
    return dataset.encoding


def _shard_names(count: int) -> set[str]:
    """Files of `count` ranks, as torch.distributed.checkpoint names them."""
    return {f"shard-{number:05d}-model-00001-of-00001.safetensors" for number in range(1, count + 1)}


def saved_steps(folder: Path) -> list[int]:
    """Steps after which the run in `folder` has a checkpoint, in order."""
    return [_step_of(path) for path in _checkpoints(folder)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _remove_old(folder: Path, keep_at: Collection[int]) -> None:
    others = [path for path in _checkpoints(folder) if _step_of(path) not in keep_at]
    for path in others[:-KEEP]:
        _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
