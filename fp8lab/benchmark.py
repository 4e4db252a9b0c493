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

import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fp8lab import records, trainer
from fp8lab.checkpoint import MODEL_FILE
from fp8lab.config import RunConfig, load_plan, validate
from fp8lab.data import Loader
from fp8lab.data.benchmark import PLAN, print_summary, summary, write_benchmark
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.precision import convert, fp8_tensor_cores, uses_fp8
from fp8lab.session import Session, compile_blocks, device_name, make_optimizer, training_device
from fp8lab.speed import optimizer_step

SAVE_EVERY = 500
"""Steps between checkpoints that the cost of one is spread over."""
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 600

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()


class _Enough(Exception):
    """All rounds are measured; the rest of the run is of no interest."""


class _PacedSession(Session):
    """A session under the trainer's own loop that calls `between` before each step, and times what it can."""

    between: Callable[[int], None] | None = None
    """Called with the number of steps done."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.validation_seconds: list[float] = []
        self.health_seconds: list[float] = []
        self.save_seconds: list[float] = []
        """What each save kept the loop from the next step."""
        self._save_began: float | None = None

    def take_step(self, batch: Tensor) -> None:
        if self._save_began is not None:
            self.save_seconds.append(time.perf_counter() - self._save_began)
            self._save_began = None
        if self.between is not None:
            self.between(self.step)
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
    session, recorder, loader = _paced(
        _short(
            config,
            steps_per_round * (rounds + 1) + 1,
            validation_interval=steps_per_round,
            health_interval=steps_per_round if config.health_interval else 0,
        ),
        data_dir,
        scratch,
    )
    bare = _BareStep(session, loader, distinct_batches=steps_per_round)
    ours: list[float] = []
    theirs: list[float] = []
    began = 0.0

    def between(step: int) -> None:
        nonlocal began
        if step == 0 or step % steps_per_round:
            return
        if step == steps_per_round:
            bare.seconds(steps_per_round)  # compiles, as this first round of the trainer did
        else:
            apart = session.validation_seconds[-1] + sum(session.health_seconds[-1:])
            ours.append((session.now() - began - apart) / steps_per_round)
        if len(ours) == rounds:
            raise _Enough
        theirs.append(bare.seconds(steps_per_round) / steps_per_round)
        began = session.now()

    session.between = between
    _drive(recorder)
    loop = [own / other - 1 for own, other in zip(ours, theirs, strict=True)]
    steps = config.global_batch_tokens / _tokens_a_step(config)
    validation = _shares(session.validation_seconds[1:], theirs, steps * config.validation_interval)
    health = _shares(session.health_seconds[1:], theirs, steps * config.health_interval)
    parts = [part for part in (loop, validation, health) if part]
    return {
        "steps_per_round": steps_per_round,
        "bare_step_seconds": summary(theirs),
        "trainer_step_seconds": summary(ours),
        "validation_seconds": summary(session.validation_seconds[1:]),
        "health_seconds": summary(session.health_seconds[1:]) if health else None,
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
    seconds: dict[bool, list[float]] = {True: [], False: []}
    writes: list[float] = []
    writer = recorder.writer
    assert writer is not None  # a process alone writes its checkpoints
    began = 0.0

    def between(step: int) -> None:
        nonlocal began
        # The trainer saves after its step: a round that begins one step earlier has the save in it.
        turn, rest = divmod(step + 1, steps_per_round)
        if rest or turn < 2:
            return
        if turn > 2:
            saving = turn % 2 == 1
            seconds[saving].append((session.now() - began) / steps_per_round)
            writer.wait()
            if saving:
                writes.append(writer.write_seconds)
        if turn == 2 * rounds + 2:
            raise _Enough
        began = session.now()

    session.between = between
    _drive(recorder)
    newest = max(session.folder.glob("step-*"))
    lost = [
        (with_save - without) * steps_per_round
        for with_save, without in zip(seconds[True], seconds[False], strict=True)
    ]
    step_seconds = statistics.median(seconds[False])
    return {
        "steps_per_round": steps_per_round,
        "save_every": SAVE_EVERY,
        "step_seconds": summary(seconds[False]),
        "step_seconds_with_a_save": summary(seconds[True]),
        "lost_seconds": summary(lost),
        "cost": summary([loss / (SAVE_EVERY * step_seconds) for loss in lost]),
        # The first save page-locks its memory.
        "first_stall_seconds": session.save_seconds[0],
        "stall_seconds": summary(session.save_seconds[1:] or session.save_seconds),
        "write_seconds": summary(writes),
        "write_outlasted_a_round": max(writes) > steps_per_round * step_seconds,
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir()),
    }


def measure_resume(
    config: RunConfig,
    *,
    data_dir: Path,
    scratch: Path,
    steps: int,
    worker: Sequence[str] = (sys.executable, "-m", "fp8lab.trainer"),
) -> dict[str, Any]:
    """Train the same short run three times: twice to its end, and once killed (SIGKILL) and resumed.

    The two whole runs are the control: a GPU adds in no fixed order, so they may differ as well.

    Returns:
        `control` and `resumed`, each compared with the first whole run (`_compare`); `killed_after_checkpoint`, the
        step of the newest checkpoint at the kill.
    """
    interval = max(1, steps // 4)
    config = _short(config, steps, checkpoint_interval=interval, log_interval=1)
    runs = {name: _Worker(config, worker, data_dir, scratch / name) for name in ("whole", "control", "resumed")}
    runs["whole"].run()
    runs["control"].run()
    killed_after = runs["resumed"].kill(after_checkpoint=2 * interval)
    runs["resumed"].run()
    return {
        "steps": steps,
        "killed_after_checkpoint": killed_after,
        "control": _compare(runs["whole"], runs["control"]),
        "resumed": _compare(runs["whole"], runs["resumed"]),
    }


class _Worker:
    """The training worker in a process of its own, on folders of its own."""

    def __init__(self, config: RunConfig, command: Sequence[str], data_dir: Path, root: Path) -> None:
        root.mkdir(parents=True)
        self.checkpoints = root / "checkpoints" / config.plan / config.run
        self.record_folder = root / "records" / config.plan / config.run
        path = root / "config.json"
        path.write_text(config.model_dump_json())
        folders = {"records": root / "records", "data": data_dir, "checkpoints": root / "checkpoints"}
        self._command = [*command, str(path)]
        self._command += [f"--{name}-dir={folder}" for name, folder in folders.items()]

    def run(self) -> None:
        """Train to the end."""
        done = subprocess.run(self._command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the worker ended with {done.returncode}: {done.stderr.strip()}")

    def kill(self, *, after_checkpoint: int) -> int:
        """Start, and kill as soon as the checkpoint after that step is there; returns the newest one's step."""
        process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.checkpoints / f"step-{after_checkpoint:08d}").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"no checkpoint to kill the worker after: {process.communicate()[1].strip()}")
            time.sleep(POLL_SECONDS)
        process.kill()
        process.communicate()
        return max(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))


def _compare(one: _Worker, other: _Worker) -> dict[str, Any]:
    """How far two finished runs of one configuration are apart: final weights, training losses, validation loss."""
    weights, others = (load_file(worker.checkpoints / MODEL_FILE) for worker in (one, other))
    differences = {name: (weights[name] - others[name]).abs() for name in weights}
    curves = [records.read_table(worker.record_folder, "metrics") for worker in (one, other)]
    losses = (curves[0]["loss"] - curves[1]["loss"]).abs()
    finals = []
    for worker in (one, other):
        record = records.read(worker.record_folder)
        assert isinstance(record, records.TrainRecord)
        assert record.final is not None
        finals.append(record.final.validation_loss)
    parted = curves[0]["step"][losses > 0]
    return {
        "weights_identical": all(torch.equal(weights[name], others[name]) for name in weights),
        "largest_weight_difference": max(float(difference.max()) for difference in differences.values()),
        "equal_weights_share": sum(int((difference == 0).sum()) for difference in differences.values())
        / sum(difference.numel() for difference in differences.values()),
        "steps_logged": [len(curve) for curve in curves],
        "curve_identical": len(curves[0]) == len(curves[1]) and not len(parted),
        "first_different_step": int(parted.iloc[0]) if len(parted) else None,
        "largest_loss_difference": float(losses.max()),
        "validation_loss_difference": finals[1] - finals[0],
    }


def _short(config: RunConfig, steps: int, **changes: Any) -> RunConfig:
    """`config` for `steps` steps of one micro-batch, with no validation or checkpoint that is not asked for."""
    values = config.model_dump(mode="json") | {
        "plan": PLAN,
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


def _drive(recorder: trainer.Recorder) -> None:
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
    with _measured("overhead", plan, run, mixture, scratch, records_dir) as (config, folder, results):
        results |= measure_overhead(
            config, data_dir=data_dir, scratch=folder, rounds=rounds, steps_per_round=steps_per_round
        )
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
    with _measured("checkpoint", plan, run, mixture, scratch, records_dir) as (config, folder, results):
        results |= measure_checkpoint(
            config, data_dir=data_dir, scratch=folder, rounds=rounds, steps_per_round=steps_per_round
        )
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
    with _measured("resume", plan, run, mixture, scratch, records_dir) as (config, folder, results):
        results |= measure_resume(config, data_dir=data_dir, scratch=folder, steps=steps)
    for what in ("control", "resumed"):
        console.print(f"{what}: {results[what]}")


@contextmanager
def _measured(
    what: str, plan: Path, run: str, mixture: str | None, scratch: Path | None, records_dir: Path
) -> Iterator[tuple[RunConfig, Path, dict[str, Any]]]:
    """The run to measure, a folder that goes afterwards, and the results of the record that is then written."""
    config = load_plan(plan)[run]
    if mixture is not None:
        config = config.model_copy(update={"mixture": mixture})
    provenance = records.collect_provenance(device_name(training_device()))
    provenance.command = shlex.join(["python", "-m", "fp8lab.benchmark", *sys.argv[1:]])
    results: dict[str, Any] = _facts(config)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield config, Path(folder), results
    name = f"trainer-{what}-{config.model.name}-{config.recipe}"
    write_benchmark(name, results, provenance, records_dir, config=config.model_dump(mode="json"))


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
