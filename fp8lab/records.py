"""The run record: the waist of the hourglass.

Everything that produces results writes one of these, and everything that shows results reads
nothing else. A record is a folder ``<records_dir>/<plan>/<run>/`` with ``record.json`` and tables
beside it:

====================  ==========================================================================
``metrics.parquet``   a row a logged step
``validation.parquet``  a row a validation and domain
``health.parquet``    a row a step, layer and tensor: FP8 health
``steps.parquet``     a row a timed step (speed runs)
``eval.json``         lm-eval's result dictionary, scored in BF16; ``eval-<recipe>.json`` in FP8
====================  ==========================================================================

A plan of many compact runs keeps one ``metrics.parquet`` for all, and so with the other tables of training,
beside their folders, with a column `run`.

Writing is atomic (temporary name, fsync, rename); reading validates, and an error names the file
and the field or column. Nothing in a record can execute: a record is JSON and parquet only, and a string in it
that the article's pages could read as markup is refused, except free text (`FREE_TEXT`), which the
article shows through `article.literal` alone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, TypeAdapter, ValidationError

from fp8lab import flops
from fp8lab.config import MARKUP, Head, Name, Recipe, RunConfig
from fp8lab.errors import UserError

Status = Literal["running", "finished", "interrupted", "diverged", "failed"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "metrics": ("step", "tokens", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "skipped"),
    "validation": ("step", "tokens", "domain", "loss", "bits_per_byte"),
    "health": (
        "step",
        "layer",
        "tensor",
        "amax",
        "scale",
        "underflow_fraction",
        "saturation_fraction",
        "sqnr_db",
        "kurtosis",
        "gradient_norm",
    ),
    "steps": (
        "model",
        "seq_len",
        "micro_batch",
        "recipe",
        "head",
        "round",
        "step",
        "step_ms",
        "tokens",
        "peak_memory_bytes",
        "sm_clock_mhz",
        "power_w",
    ),
}
"""Columns that each table must have; a table may have more (a shared one has `run`)."""
TRAINING_TABLES = ("metrics", "validation", "health")
"""Those that a training run writes."""


FREE_TEXT = frozenset(
    (
        *("command", "description", "error", "faults", "kernel", "reason", "samples", "source", "traceback"),
        *("health_layers", "high_precision"),
    )
)
"""Fields that may hold any text: messages, code, what a model wrote; and shell patterns."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


class RecordedModel(_Part):
    name: str
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab_size: int
    seq_len: int
    tied: bool


class ParameterCounts(_Part):
    total: int
    non_embedding: int
    matmul: int


class Flops(_Part):
    per_token_6n: int
    per_token_matmul_attention: int
    per_token_matmul_attention_causal: int
    total: int


class DomainLoss(_Part):
    loss: float
    """Nats a token."""
    bits_per_byte: float


class ValidationLosses(_Part):
    validation_loss: FiniteFloat
    """Nats a token: the domains' losses, averaged by the mixture's weights."""
    bits_per_byte: FiniteFloat
    by_domain: dict[str, DomainLoss]


class FinalLosses(ValidationLosses):
    train_loss: float | None
    """Nats a token, mean of the last logged steps that were not skipped (at most 20); None where all were."""
    averaged: ValidationLosses | None = None
    """Of the moving average of the weights, where one was kept and its losses are finite."""


class Stability(_Part):
    spike_score: float
    """Share of the judged losses at least 7 standard deviations from the mean of the 1,000 before (OLMo 2, 2501.00656).

    Of every step's; where `judged_steps` is None, of the logged steps' alone.
    """
    judged_steps: int | None = None
    """Steps that `spike_score` could judge: finite losses but the first 100. None where a record does not say."""
    first_spike_step: int | None = None
    """The first of every step, logged or not, that spiked; None also where a record does not say."""
    skipped_steps: int
    first_bad_step: int | None
    first_bad_layer: str | None
    saturated_steps: dict[str, int] | None = None
    """Steps in which a tensor ('blocks.0.mlp.down input') exceeded its format's largest number; none is left out.

    None where nothing counts: only the delayed scales of `fused` can be exceeded.
    """
    underflowing_steps: dict[str, int] | None = None
    """Steps in which even the largest magnitude of a tensor was below its format's smallest normal number."""


class Speed(_Part):
    tokens_per_second_median: float | None
    """From the median logged step, the warm-up after each start left out; None where no step is left."""
    tokens_per_second_end_to_end: float
    """All tokens over all wall time: data, validation, logging and checkpoints included."""
    bf16_mfu: float | None
    """Against 989.4 TFLOP/s; None off the GPU."""
    peak_memory_bytes: int | None
    wall_seconds: float


class Provenance(_Part):
    git_commit: str
    git_dirty: bool
    started_utc: str
    ended_utc: str
    command: str
    device_name: str
    device_count: int
    host_count: int
    versions: dict[str, str]
    data_sha256: str | None = None
    tokenizer_sha256: str | None = None
    epochs: dict[str, float] | None = None
    """Passes over each domain's training text."""
    concurrent_runs: int = 1
    """Runs at once on the same GPUs (on the machine, where it has none): above 1, their speeds say little."""


class Parent(_Part):
    run: str
    step: int


class _Record(_Part):
    schema_: Literal[1] = Field(default=1, alias="schema")
    plan: Name
    run: Name
    status: Status
    reason: str | None = None
    """Why a run is not finished: one line."""
    provenance: Provenance


class TrainRecord(_Record):
    """One training run."""

    kind: Literal["train"] = "train"
    parent: Parent | None = None
    """The run and step that a decay branch starts from."""
    recipe: Recipe
    head: Head
    emulated: bool
    """True where FP8 arithmetic was simulated: the losses are FP8's, the speed is not."""
    seed: int
    model: RecordedModel
    parameters: ParameterCounts
    tokens: int
    """Tokens trained on so far."""
    steps: int
    """Optimizer steps done so far."""
    global_batch_tokens: int
    flops: Flops
    final: FinalLosses | None = None
    """Present when the run finished."""
    stability: Stability | None = None
    speed: Speed | None = None
    conversion: list[dict[str, str]] = []
    """What the precision swap did to each Linear: name, shape, converted, reason."""
    samples: list[str] = []
    """Text the finished model wrote."""
    config: dict[str, Any]
    """The whole resolved configuration."""


class SpeedRecord(_Record):
    """Timed optimizer steps of several recipes, alternating in one process; the steps are in steps.parquet."""

    kind: Literal["speed"] = "speed"
    results: dict[str, Any]
    """Profiles, compile seconds and GEMM ceilings by model and recipe."""
    config: dict[str, Any]


class DataRecord(_Record):
    """What a data build read, removed and wrote."""

    kind: Literal["data"] = "data"
    results: dict[str, Any]
    """By domain: documents, bytes and tokens, removals by reason, hashes, sources and licences."""
    config: dict[str, Any]


BENCHMARK_PLAN = "benchmarks"
"""Plan of every `BenchmarkRecord`; their runs are 'data-...', 'trainer-...' and 'kernels-<device>'."""


class BenchmarkRecord(_Record):
    """A measurement of this software itself: tokeniser, loader, checkpoint, trainer overhead or kernels."""

    kind: Literal["benchmark"] = "benchmark"
    results: dict[str, Any]
    config: dict[str, Any] = {}


class TestRecord(_Record):
    """Outcomes of fault tests, as the tests themselves wrote them."""

    __test__ = False  # not a pytest class
    kind: Literal["test"] = "test"
    results: dict[str, Any]
    config: dict[str, Any] = {}


Record = TrainRecord | SpeedRecord | DataRecord | BenchmarkRecord | TestRecord
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Discriminator("kind")])


KERNELS = "fused kernels"
"""Among a record's versions: what `fused` ran on. Two commits with the same can be measured together."""


def started(config: RunConfig, provenance: Provenance, *, emulated: bool) -> TrainRecord:
    """The record of a run that has begun: status 'running', no results yet."""
    model = config.model
    return TrainRecord(
        plan=config.plan,
        run=config.run,
        status="running",
        provenance=provenance,
        recipe=config.recipe,
        head=config.head,
        emulated=emulated,
        seed=config.seed,
        model=RecordedModel(**model.model_dump(include=set(RecordedModel.model_fields)), tied=True),
        parameters=ParameterCounts(**asdict(flops.parameters(model))),
        tokens=0,
        steps=0,
        global_batch_tokens=config.global_batch_tokens,
        flops=Flops(**flops.flops_record(model, 0)),
        config=config.model_dump(mode="json"),
    )


def record_dir(records_dir: Path, plan: str, run: str) -> Path:
    """Folder of one record."""
    return records_dir / plan / run


def make_writable(folder: Path) -> None:
    """Make `folder` where there is none: before the work whose result goes there.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written to")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(record: Record, records_dir: Path) -> Path:
    """Write ``record.json`` and return the record's folder.

    Raises:
        UserError: a string in it could be read as markup.
        ValueError: it could not be read again, for example for a number that is not finite, which JSON cannot hold.
            Either way the file is as it was.
    """
    folder = record_dir(records_dir, record.plan, record.run)
    path = folder / "record.json"
    text = record.model_dump_json(by_alias=True, indent=2)
    values = json.loads(text)
    try:
        _RECORD.validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_problem(error)}; is it a number that is not finite?") from None
    _refuse_markup(values, path)
    write_atomically(path, text.encode() + b"\n")
    return folder


def read(folder: Path) -> Record:
    """Read and validate ``record.json``.

    Raises:
        UserError: the file is missing, truncated or not a valid record, or holds markup; the message names the file
            and field.
    """
    path = folder / "record.json"
    values = _read_json(path)
    try:
        return _RECORD.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None


def content(folder: Path) -> bytes | None:
    """``record.json`` as it is, to tell whether it has been written anew; None where there is none."""
    path = folder / "record.json"
    return path.read_bytes() if path.exists() else None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "(top level)"
    return f"{field}: {first['msg']}"


def _read_json(path: Path) -> Any:
    """The values of a JSON file, none of them markup."""
    try:
        values = json.loads(path.read_bytes())
        _refuse_markup(values, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a record") from None
    except ValueError as error:
        raise UserError(f"{path}: truncated or not JSON ({error})") from None
    return values


def _refuse_markup(values: Any, path: Path, field: str = "") -> None:
    """Raise a UserError that names the first string in `values`, names of fields included, that may be markup."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_markup(name, path, field)
            if name not in FREE_TEXT:
                _refuse_markup(value, path, f"{field}.{name}" if field else name)
    elif isinstance(values, list):
        for value in values:
            _refuse_markup(value, path, field)
    elif isinstance(values, str) and (mark := MARKUP.search(values)):
        raise UserError(
            f"{path}: {field or '(top level)'}: {values[:60]!r}: {mark[0]!r} could be read as markup; accepted: "
            "one line of text without < [ ] { } ` $ | \\ and 'script:'"
        )


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.parquet`` atomically.

    Raises:
        UserError: a required column is missing.
    """
    path = folder / f"{name}.parquet"
    _check_columns(path, name, table.columns)
    sink = pa.BufferOutputStream()
    table.to_parquet(sink, index=False, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """Read ``<name>.parquet``.

    Raises:
        UserError: the file is missing or damaged, lacks a column or holds markup; the message names both.
    """
    path = folder / f"{name}.parquet"
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: truncated or not parquet ({error})") from None
    _check_columns(path, name, table.columns)
    for column in table.select_dtypes(exclude=["number", "bool"]):
        _refuse_markup(table[column].unique().tolist(), path, str(column))
    return table


def share_tables(records_dir: Path, plan: str, run: str) -> None:
    """Move a run's tables into those that the runs of its plan share, where a column `run` tells them apart.

    Rows of an earlier attempt are replaced, also by none. Until all is shared the run has its own tables, which
    readers prefer; where it has none, it is shared already. Several processes may share at once.
    """
    folder = record_dir(records_dir, plan, run)
    own = {name: folder / f"{name}.parquet" for name in TRAINING_TABLES}
    # Every attempt writes metrics. They go first: what a process that died here has left behind is shared already.
    if own["metrics"].exists():
        rows = {name: read_table(folder, name) for name in TRAINING_TABLES if own[name].exists()}
        _replace_shared_rows(records_dir / plan, run, rows)
    for path in own.values():
        path.unlink(missing_ok=True)


def drop_shared_rows(records_dir: Path, plan: str, run: str) -> None:
    """Remove a run's rows from the tables that its plan's runs share, if there are any."""
    if (records_dir / plan).is_dir():
        _replace_shared_rows(records_dir / plan, run, {})


def _replace_shared_rows(plan_folder: Path, run: str, rows: Mapping[str, pd.DataFrame]) -> None:
    """Put `rows`, by name of table, in the place of all that the shared tables have of `run`."""
    descriptor = os.open(plan_folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for name in TRAINING_TABLES:
            path = plan_folder / f"{name}.parquet"
            shared = read_table(plan_folder, name) if path.exists() else pd.DataFrame({"run": []})
            others = shared[shared["run"] != run]
            if name in rows:
                table = rows[name].assign(run=run)
                table = pd.concat([others, table], ignore_index=True) if len(others) else table
                write_table(plan_folder, name, table.sort_values("run", kind="stable"))
            elif len(others) < len(shared):
                write_table(plan_folder, name, others)
    finally:
        os.close(descriptor)


def _check_columns(path: Path, name: str, columns: Iterable[str]) -> None:
    missing = [column for column in COLUMNS[name] if column not in columns]
    if missing:
        raise UserError(f"{path}: missing column {', '.join(missing)}")


def read_eval(folder: Path) -> dict[str, Any]:
    """lm-eval's results (``eval.json``).

    Raises:
        UserError: the file is missing or damaged, has no 'results' or holds markup.
    """
    path = folder / "eval.json"
    values = _read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("results"), dict):
        raise UserError(f"{path}: results: missing")
    return values


def read_plan(records_dir: Path, plan: str) -> Iterator[tuple[Path, Record]]:
    """Every record of a plan, by name of run."""
    for path in sorted((records_dir / plan).glob("*/record.json")):
        yield path.parent, read(path.parent)
