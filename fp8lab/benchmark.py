"""What the trainer costs beyond the step itself, and what a killed run loses, measured where it runs.

    python -m fp8lab.benchmark overhead runs/plans/ladder-h200.yaml 7M-fused-s1
    python -m fp8lab.benchmark checkpoint runs/plans/article.yaml 125M-bf16-s1 --mixture local
    python -m fp8lab.benchmark resume runs/plans/ladder-h200.yaml 7M-fused-s1

Each writes a benchmark record, ``runs/records/benchmarks/trainer-<what>-<model>-<recipe>/``, with every
round's figure. The run measured is the plan's, cut short, with one micro-batch a step: a step of many would
hide the trainer's own time. It is driven by the trainer's own loop, which hands over between steps
(`_PacedSession`) so that whatever it is compared with takes its turns in the same process, on the same GPU at
the same clock.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from fp8lab import records, trainer
from fp8lab.checkpoint import MODEL_FILE, CheckpointWriter
from fp8lab.config import RunConfig, load_plan, validate
from fp8lab.data import Loader
from fp8lab.measurement import begin_provenance, console, print_summary, run_app, summary, write_benchmark
from fp8lab.model import GPT
from fp8lab.precision import convert, fp8_tensor_cores, uses_fp8
from fp8lab.session import Session, compile_blocks, device_name, make_optimizer, training_device
from fp8lab.speed.step import optimizer_step

SAVE_EVERY = 500
"""Steps between checkpoints that the cost of one is spread over."""
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 600

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


class _Enough(Exception):
    """All rounds are measured; the rest of the run is of no interest."""


class _PacedSession(Session):
    """A session under the trainer's own loop that takes turns with something else, and times what it can."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.turns: Iterator[int] = iter(())
        """Runs between the session's steps: yields how many of them come next, and ends the run where it ends."""
        self._turn_ends = 0
        self.validation_seconds: list[float] = []
        self.health_seconds: list[float] = []
        self.save_seconds: list[float] = []
        """What each save kept the loop from the next step."""
        self._save_began: float | None = None

    def take_step(self, batch: Tensor) -> None:
        if self._save_began is not None:
            self.save_seconds.append(time.perf_counter() - self._save_began)
            self._save_began = None
        if self.step == self._turn_ends:
            steps = next(self.turns, None)
            if steps is None:
                raise _Enough
            self._turn_ends += steps
        super().take_step(batch)

    def validate(self) -> None:
        began = self.now()
        super().validate()
        self.validation_seconds.append(self.now() - began)

    def _measure_health(self, batch: Tensor, gradient_norms: Tensor) -> None:
        if not self.config.health_interval or (self.step + 1) % self.config.health_interval:
            return
        began = self.now()
        super()._measure_health(batch, gradient_norms)
        self.health_seconds.append(self.now() - began)

    def state(self) -> Any:
        # Waits for the steps under way: those are not the save's time.
        self._save_began = self.now()
        return super().state()

    def now(self) -> float:
        """Seconds, when the device has done all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class _BareStep:
    """`fp8lab.speed`'s step on a run's model, optimizer and batches, which are on the device already."""

    def __init__(self, session: _PacedSession, loader: Loader, distinct_batches: int) -> None:
        config = session.config
        self._session = session
        self._model = GPT(config.model)
        self._model.initialise(config.seed)
        self._model.to(session.device)
        convert(self._model, config.recipe, config.head, config.high_precision)
        self._model.train()
        self._model.checkpoint_activations = config.activation_checkpointing
        if config.compile:
            compile_blocks(self._model, session.device)
        self._optimizer = make_optimizer(self._model, config, session.device)
        self._batches = [torch.from_numpy(loader.batch(step)).to(session.device) for step in range(distinct_batches)]

    def seconds(self, steps: int) -> float:
        """Time of `steps` steps."""
        began = self._session.now()
        for step in range(steps):
            optimizer_step(self._model, self._optimizer, self._batches[step % len(self._batches)])
        return self._session.now() - began


@dataclass
class _OverheadTurns:
    """The trainer and the bare step in turns, after a turn of each that compiles; one figure of each a round."""

    session: _PacedSession
    bare: _BareStep
    rounds: int
    steps: int
    """Steps a turn."""
    bare_seconds: list[float] = field(default_factory=list)
    """A step."""
    trainer_seconds: list[float] = field(default_factory=list)
    """A step, without validation and health."""

    def __iter__(self) -> Iterator[int]:
        session = self.session
        yield self.steps
        self.bare.seconds(self.steps)
        for _ in range(self.rounds):
            self.bare_seconds.append(self.bare.seconds(self.steps) / self.steps)
            began = session.now()
            yield self.steps
            apart = session.validation_seconds[-1] + sum(session.health_seconds[-1:])
            self.trainer_seconds.append((session.now() - began - apart) / self.steps)


def measure_overhead(
    config: RunConfig, *, data_dir: Path, scratch: Path, rounds: int, steps_per_round: int
) -> dict[str, Any]:
    """Rounds of the trainer and of the bare step in turns; a round of the trainer has one validation and health probe.

    Data, logging, progress and event files are in the trainer's steps. Validation and health are timed apart, because
    the plan asks for them at intervals of its own.

    Returns:
        seconds a step of both (`trainer_step_seconds` without validation and health), `validation_seconds` and
        `health_seconds`, and round by round, as shares of the bare step: what the trainer adds to each step
        (`loop_share`), what validation and health add at the plan's intervals (None where it has none), and the sum.
    """
    intervals = {
        "validation_interval": steps_per_round,
        "health_interval": steps_per_round if config.health_interval else 0,
    }
    session, recorder, loader = _paced(
        _short(config, steps_per_round * (rounds + 1) + 1, **intervals), data_dir, scratch
    )
    bare = _BareStep(session, loader, distinct_batches=steps_per_round)
    turns = _OverheadTurns(session, bare, rounds, steps_per_round)
    _drive(recorder, session, turns)
    return {"steps_per_round": steps_per_round} | _overhead(config, turns)


def _overhead(config: RunConfig, turns: _OverheadTurns) -> dict[str, Any]:
    """What the turns say of the run that the plan asks for, `config`."""
    ours, theirs = turns.trainer_seconds, turns.bare_seconds
    # The first of each compiles.
    validation_seconds, health_seconds = turns.session.validation_seconds[1:], turns.session.health_seconds[1:]
    micro_steps = config.global_batch_tokens / _tokens_a_step(config)
    loop = [own / other - 1 for own, other in zip(ours, theirs, strict=True)]
    validation = _shares(validation_seconds, theirs, micro_steps * config.validation_interval)
    health = _shares(health_seconds, theirs, micro_steps * config.health_interval)
    parts = [part for part in (loop, validation, health) if part]
    return {
        "bare_step_seconds": summary(theirs),
        "trainer_step_seconds": summary(ours),
        "validation_seconds": summary(validation_seconds),
        "health_seconds": summary(health_seconds) if health else None,
        "loop_share": summary(loop),
        "validation_share": summary(validation) if validation else None,
        "health_share": summary(health) if health else None,
        "overhead": summary([sum(shares) for shares in zip(*parts, strict=True)]),
    }


def _shares(seconds: Sequence[float], step_seconds: Sequence[float], steps: float) -> list[float]:
    """What something that takes so long every so many steps adds to each; empty where it never happens."""
    if not steps:
        return []
    return [own / (steps * other) for own, other in zip(seconds, step_seconds, strict=True)]


@dataclass
class _CheckpointTurns:
    """Turns with a checkpoint near their beginning and turns without; one figure of each a round."""

    session: _PacedSession
    writer: CheckpointWriter
    rounds: int
    steps: int
    """Steps a turn; the session saves every two turns."""
    seconds_with: list[float] = field(default_factory=list)
    """A step."""
    seconds_without: list[float] = field(default_factory=list)
    """A step."""
    write_seconds: list[float] = field(default_factory=list)
    """Of each write, in the background."""

    def __iter__(self) -> Iterator[int]:
        # The trainer saves after its step: a turn that begins one step earlier has the save in it.
        yield 2 * self.steps - 1
        for _ in range(self.rounds):
            yield from self._turn(self.seconds_with)
            self.write_seconds.append(self.writer.write_seconds)
            yield from self._turn(self.seconds_without)

    def _turn(self, seconds: list[float]) -> Iterator[int]:
        began = self.session.now()
        yield self.steps
        seconds.append((self.session.now() - began) / self.steps)
        self.writer.wait()


def measure_checkpoint(
    config: RunConfig, *, data_dir: Path, scratch: Path, rounds: int, steps_per_round: int
) -> dict[str, Any]:
    """Rounds of training with one checkpoint near their beginning and without in turns.

    A round must outlast the write in the background, or what that costs is not all in it.

    Returns:
        seconds a step in both, seconds lost to a save and their share of `SAVE_EVERY` steps, seconds that a save
        kept the loop from its next step, seconds of the write in the background, and a checkpoint's bytes.
    """
    steps = steps_per_round * (2 * rounds + 2) + 1
    session, recorder, _ = _paced(_short(config, steps, checkpoint_interval=2 * steps_per_round), data_dir, scratch)
    writer = recorder.writer
    assert writer is not None, "a process alone writes its checkpoints"
    turns = _CheckpointTurns(session, writer, rounds, steps_per_round)
    _drive(recorder, session, turns)
    newest = max(session.folder.glob("step-*"))
    return {"checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir())} | _checkpoint_cost(turns)


def _checkpoint_cost(turns: _CheckpointTurns) -> dict[str, Any]:
    pairs = zip(turns.seconds_with, turns.seconds_without, strict=True)
    lost = [(with_save - without) * turns.steps for with_save, without in pairs]
    step_seconds = statistics.median(turns.seconds_without)
    stalls = turns.session.save_seconds
    return {
        "steps_per_round": turns.steps,
        "save_every": SAVE_EVERY,
        "step_seconds": summary(turns.seconds_without),
        "step_seconds_with_a_save": summary(turns.seconds_with),
        "lost_seconds": summary(lost),
        "cost": summary([loss / (SAVE_EVERY * step_seconds) for loss in lost]),
        # The first save page-locks its memory.
        "first_stall_seconds": stalls[0],
        "stall_seconds": summary(stalls[1:] or stalls),
        "write_seconds": summary(turns.write_seconds),
        "write_outlasted_a_round": max(turns.write_seconds) > turns.steps * step_seconds,
    }


StartWorker = Callable[[list[str], Path], BaseProcess]
"""Starts a process that trains by the arguments of `fp8lab.trainer.main`, and says to a file what it has to say."""


def spawn(arguments: list[str], output: Path) -> BaseProcess:
    """The training worker in a new interpreter."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(arguments, output))
    process.start()
    return process


def _train(arguments: list[str], output: Path) -> None:
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(trainer.main(arguments))


def measure_resume(
    config: RunConfig,
    *,
    data_dir: Path,
    scratch: Path,
    steps: int,
    start: StartWorker = spawn,
) -> dict[str, Any]:
    """Train the same short run three times: twice to its end, and once killed (SIGKILL) and resumed.

    The two whole runs are the control: a GPU adds in no fixed order, so they may differ as well.

    Returns:
        `control` and `resumed`, each compared with the first whole run (`_compare`); `killed_after_checkpoint`, the
        step of the newest checkpoint at the kill.
    """
    interval = max(1, steps // 4)
    config = _short(config, steps, checkpoint_interval=interval, log_interval=1)
    runs = {name: _Worker(config, start, data_dir, scratch / name) for name in ("whole", "control", "resumed")}
    runs["whole"].run()
    runs["control"].run()
    killed_after = runs["resumed"].kill(after_checkpoint=interval)
    runs["resumed"].run()
    return {
        "steps": steps,
        "killed_after_checkpoint": killed_after,
        "control": _compare(runs["whole"], runs["control"]),
        "resumed": _compare(runs["whole"], runs["resumed"]),
    }


class _Worker:
    """The training worker in a process of its own, on folders of its own."""

    def __init__(self, config: RunConfig, start: StartWorker, data_dir: Path, root: Path) -> None:
        root.mkdir(parents=True)
        self.checkpoints = root / "checkpoints" / config.plan / config.run
        self.record_folder = root / "records" / config.plan / config.run
        path = root / "config.json"
        path.write_text(config.model_dump_json())
        folders = {"records": root / "records", "data": data_dir, "checkpoints": root / "checkpoints"}
        arguments = [str(path), *(f"--{name}-dir={folder}" for name, folder in folders.items())]
        # Not a pipe: one that nobody empties stops who writes to it.
        self._output = root / "output.txt"
        self._start = functools.partial(start, arguments, self._output)

    def run(self) -> None:
        """Train to the end."""
        process = self._start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the worker ended with {process.exitcode}: {self._said()}")

    def kill(self, *, after_checkpoint: int) -> int:
        """Start, and kill as soon as the checkpoint after that step is there; returns the newest one's step."""
        process = self._start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.checkpoints / f"step-{after_checkpoint:08d}").exists():
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"no checkpoint to kill the worker after: {self._said()}")
            time.sleep(POLL_SECONDS)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError("the worker was through before it could be killed: let it take more steps")
        return max(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))

    def _said(self) -> str:
        return self._output.read_text().strip()


def _compare(one: _Worker, other: _Worker) -> dict[str, Any]:
    """How far two finished runs of one configuration are apart: final weights, training losses, validation loss."""
    weights, others = (load_file(worker.checkpoints / MODEL_FILE) for worker in (one, other))
    differences = {name: (weights[name] - others[name]).abs() for name in weights}
    curves = [records.read_table(worker.record_folder, "metrics") for worker in (one, other)]
    finals = []
    for worker in (one, other):
        record = records.read(worker.record_folder)
        assert isinstance(record, records.TrainRecord)
        assert record.final is not None
        finals.append(record.final.validation_loss)
    return {
        "weights_identical": all(torch.equal(weights[name], others[name]) for name in weights),
        "largest_weight_difference": max(float(difference.max()) for difference in differences.values()),
        "equal_weights_share": sum(int((difference == 0).sum()) for difference in differences.values())
        / sum(difference.numel() for difference in differences.values()),
        **_compare_curves(*curves),
        "validation_loss_difference": finals[1] - finals[0],
    }


def _compare_curves(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """Where two runs' rows of metrics part.

    A loss that is NaN in both, a skipped step's, is the same; one that is NaN, or missing, in one of them is not. The
    largest difference is of losses that are finite in both.
    """
    losses, others = (curve.set_index("step")["loss"] for curve in (one, other))
    losses, others = losses.align(others)
    parted = losses.index[(losses != others) & ~(losses.isna() & others.isna())]
    differences = (losses - others).abs()
    return {
        "steps_logged": [len(one), len(other)],
        "curve_identical": len(one) == len(other) and not len(parted),
        "first_different_step": int(parted[0]) if len(parted) else None,
        "largest_loss_difference": float(differences[np.isfinite(differences)].max()),
    }


def _short(config: RunConfig, steps: int, **changes: Any) -> RunConfig:
    """`config` for `steps` steps of one micro-batch, with no validation or checkpoint that is not asked for."""
    values = config.model_dump(mode="json") | {
        "plan": records.BENCHMARK_PLAN,
        "tokens": steps * _tokens_a_step(config),
        "global_batch_tokens": _tokens_a_step(config),
        "validation_interval": 0,
        "health_interval": 0,
        "checkpoint_interval": 10 * steps,
        "keep_checkpoints_at": [],
        "compact": False,
        "parent": None,
        "evaluation": "none",
    }
    return validate(RunConfig, values | changes, f"{config.plan}/{config.run}")


def _tokens_a_step(config: RunConfig) -> int:
    return config.micro_batch * config.model.seq_len


def _paced(config: RunConfig, data_dir: Path, scratch: Path) -> tuple[_PacedSession, trainer.Recorder, Loader]:
    """A run that stands at its beginning, as `trainer.train` would drive it."""
    # The bare step's model and a recompilation for validation must not run into dynamo's limit.
    torch._dynamo.config.recompile_limit = 64
    dataset, loader = trainer.open_data(config, data_dir)
    folder = scratch / "checkpoints"
    folder.mkdir(parents=True)
    session = _PacedSession(config, dataset, folder)
    return session, trainer.Recorder(session, loader, scratch / "records", None), loader


def _drive(recorder: trainer.Recorder, session: _PacedSession, turns: Iterable[int]) -> None:
    """Train until `turns` ends."""
    session.turns = iter(turns)
    try:
        recorder.run()
    except _Enough:
        return
    raise RuntimeError("the run ended before its last round")


def _facts(config: RunConfig) -> dict[str, Any]:
    """What a reader must know of the run that was measured."""
    return {
        "model": config.model.name,
        "recipe": config.recipe,
        "head": config.head,
        "emulated": uses_fp8(config.recipe, config.head) and not fp8_tensor_cores(),
        "tokens_a_step": _tokens_a_step(config),
    }


PlanPath = Annotated[Path, typer.Argument(help="A plan.")]
RunName = Annotated[str, typer.Argument(help="One of its runs.")]
Mixture = Annotated[str | None, typer.Option(help="Train on this mixture instead of the plan's.")]
DataDir = Annotated[Path, typer.Option(help="Folder of token shards.")]
RecordsDir = Annotated[Path, typer.Option(help="Folder of run records.")]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder on the disk that checkpoints are to be written to; the system's temporary one."),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of each side, after one that is not counted.")]


@app.command("overhead")
def overhead_command(
    plan: PlanPath,
    run: RunName,
    mixture: Mixture = None,
    rounds: Rounds = 3,
    steps_per_round: Annotated[int, typer.Option(min=2, help="Steps a round.")] = 100,
    data_dir: DataDir = Path("data"),
    scratch: Scratch = None,
    records_dir: RecordsDir = Path("runs/records"),
) -> None:
    """The trainer's time a step beside the bare step's: data, logging, health and validation."""
    measure = functools.partial(measure_overhead, data_dir=data_dir, rounds=rounds, steps_per_round=steps_per_round)
    results = _recorded("overhead", measure, plan, run, mixture, scratch, records_dir)
    print_summary("overhead (%)", summary([100 * value for value in results["overhead"]["rounds"]]))


@app.command("checkpoint")
def checkpoint_command(
    plan: PlanPath,
    run: RunName,
    mixture: Mixture = None,
    rounds: Rounds = 3,
    steps_per_round: Annotated[int, typer.Option(min=2, help="Steps a round; longer than a write.")] = 50,
    data_dir: DataDir = Path("data"),
    scratch: Scratch = None,
    records_dir: RecordsDir = Path("runs/records"),
) -> None:
    """What saving a checkpoint in the background costs."""
    measure = functools.partial(measure_checkpoint, data_dir=data_dir, rounds=rounds, steps_per_round=steps_per_round)
    results = _recorded("checkpoint", measure, plan, run, mixture, scratch, records_dir)
    for what in ("lost_seconds", "stall_seconds", "write_seconds"):
        print_summary(what, results[what])
    print_summary(f"cost every {SAVE_EVERY} steps (%)", summary([100 * value for value in results["cost"]["rounds"]]))


@app.command("resume")
def resume_command(
    plan: PlanPath,
    run: RunName,
    mixture: Mixture = None,
    steps: Annotated[int, typer.Option(min=8, help="Steps of the run.")] = 160,
    data_dir: DataDir = Path("data"),
    scratch: Scratch = None,
    records_dir: RecordsDir = Path("runs/records"),
) -> None:
    """A run killed with SIGKILL and resumed, beside one that was not, and the same run again as the control."""
    measure = functools.partial(measure_resume, data_dir=data_dir, steps=steps)
    results = _recorded("resume", measure, plan, run, mixture, scratch, records_dir)
    for what in ("control", "resumed"):
        console.print(f"{what}: {results[what]}")


def _recorded(
    what: str,
    measure: Callable[..., dict[str, Any]],
    plan: Path,
    run: str,
    mixture: str | None,
    scratch: Path | None,
    records_dir: Path,
) -> dict[str, Any]:
    """Call `measure` with the plan's run and a folder that goes afterwards; write the record; return what it found."""
    config = load_plan(plan)[run]
    if mixture is not None:
        config = config.model_copy(update={"mixture": mixture})
    provenance = begin_provenance("fp8lab.benchmark", device_name(training_device()))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        results = _facts(config) | measure(config, scratch=Path(folder))
    name = f"trainer-{what}-{config.model.name}-{config.recipe}"
    write_benchmark(name, results, provenance, records_dir, config=config.model_dump(mode="json"))
    return results


if __name__ == "__main__":
    run_app(app)
