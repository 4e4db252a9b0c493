"""The commands of `fp8lab.benchmark`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8lab import benchmark
from fp8lab.benchmark.overhead import measure_overhead
from fp8lab.benchmark.paced import tokens_a_step
from fp8lab.benchmark.resuming import measure_resume
from fp8lab.benchmark.saving import SAVE_EVERY, measure_checkpoint
from fp8lab.config import RunConfig
from fp8lab.measurement import begin_provenance, console, print_summary, run_app, summary, write_benchmark
from fp8lab.plan import load_plan
from fp8lab.precision import fp8_tensor_cores, uses_fp8
from fp8lab.training.device import device_name, training_device

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=benchmark.__doc__)


def _facts(config: RunConfig) -> dict[str, Any]:
    """What a reader must know of the run that was measured."""
    return {
        "model": config.model.name,
        "recipe": config.recipe,
        "head": config.head,
        "emulated": uses_fp8(config.recipe, config.head) and not fp8_tensor_cores(),
        "tokens_a_step": tokens_a_step(config),
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
