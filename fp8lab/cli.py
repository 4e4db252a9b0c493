"""The command line: ``fp8lab --help``.

Each command reads its arguments, calls one function of the package and prints what came back.
Heavy imports stay inside the commands, so that ``--help`` and ``status`` answer at once.

Exit codes: 0 done; 1 a run failed; 2 the input is wrong (one line says what); 130 and 143 stopped by
SIGINT and SIGTERM, with a checkpoint to resume from.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fp8lab.config import NAME_PATTERN, Recipe
from fp8lab.errors import UserError

app = typer.Typer(
    help="Train language models in FP8 and BF16 on the same tokens, and publish what happened.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Text into token shards.", no_args_is_help=True)
app.add_typer(data_app, name="data")
# What is printed names files and quotes errors: none of it is Rich's markup.
console = Console(markup=False)

RecordsDir = Annotated[Path, typer.Option(help="Folder of run records.")]
DataDir = Annotated[Path, typer.Option(help="Folder of token shards.")]
CheckpointsDir = Annotated[Path, typer.Option(help="Folder of checkpoints and trained weights.")]
MixtureOption = Annotated[
    str | None, typer.Option(help="Mixture to use instead of the plan's: a name in runs/mixtures, or a YAML file.")
]
EvaluationData = Annotated[
    Path | None,
    typer.Option(
        "--eval-data",
        help="Folder of evaluation data (JSON lines): scores without the hub, and keeps its items out of training.",
    ),
]
Corpus = Annotated[
    Path | None,
    typer.Option("--corpus", envvar="FP8LAB_CORPUS", help="Folder of JSON lines, for mixtures of local text."),
]
RunArgument = Annotated[str, typer.Argument(metavar="PLAN/RUN", help="A run, for example demo/1M-bf16-s1.")]

RECORDS = Path("runs/records")
DATA = Path("data")
CHECKPOINTS = Path("checkpoints")


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="Plan to execute (YAML).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print parameters, tokens, FLOPs, memory (GB) and hours.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only runs whose names match this shell pattern ('7M-*'); may be given several times."),
    ] = None,
    mixture: MixtureOption = None,
    corpus: Corpus = None,
    eval_data: EvaluationData = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Run again where a finished run was made with another configuration.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="GPUs of this machine that each run takes.")] = 1,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="Runs at once, each on GPUs of its own while there are enough, else sharing them."),
    ] = 1,
    bf16_mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of BF16's peak FLOP/s that --dry-run assumes.")
    ] = 0.4,
    records_dir: RecordsDir = RECORDS,
    data_dir: DataDir = DATA,
    checkpoints_dir: CheckpointsDir = CHECKPOINTS,
) -> None:
    """Execute every run of a plan through papermill; skip finished runs, resume interrupted ones."""
    from fp8lab.data import load_mixture
    from fp8lab.plan import load_plan
    from fp8lab.running import plans
    from fp8lab.running.workspace import Workspace
    from fp8lab.training.trainer import check_run

    resolved = load_plan(plan, mixture).only(only or [])
    mixtures = list(dict.fromkeys(config.mixture for config in resolved.runs))
    for name in mixtures:
        load_mixture(name)
    for config in resolved.runs:
        try:
            check_run(config, nproc)
        except UserError as error:
            raise UserError(f"{plan}: {config.run}: {error}") from None
    if dry_run:
        from fp8lab.estimate import SCALING_EFFICIENCY
        from fp8lab.tables.runs import planned_runs

        console.print(
            f"{resolved.description}. Planned, not measured; hours assume {bf16_mfu:.0%} BF16-MFU, and on 8 GPUs "
            f"{SCALING_EFFICIENCY:.0%} of 8 times one GPU's speed (run with --nproc 8)."
        )
        _print_frame(planned_runs(resolved, bf16_mfu))
        return
    workspace = Workspace(records=records_dir, data=data_dir, checkpoints=checkpoints_dir)
    for name in mixtures:
        console.print(f"data: mixture {name}")
        _build_data(name, data_dir, records_dir, corpus, eval_data)
    options = plans.Options(mixture=mixture, evaluation_data=eval_data, replace=replace, nproc=nproc, jobs=jobs)
    unsuccessful = plans.run_plan(resolved, workspace, options, console)
    if unsuccessful:
        console.print(f"{unsuccessful} of {len(resolved.runs)} runs did not finish", style="red")
        raise typer.Exit(1)


@app.command()
def status(
    plan: Annotated[Path | None, typer.Argument(help="Plan (YAML); all plans with records if left out.")] = None,
    records_dir: RecordsDir = RECORDS,
    checkpoints_dir: CheckpointsDir = CHECKPOINTS,
) -> None:
    """Show every run: finished, in progress (loss in nats, tokens/s, time left), or still to do."""
    from fp8lab.plan import load_plan
    from fp8lab.running.status import status_rows

    _expect_records(records_dir)
    table = Table("plan", "run", "status", "step", "loss (nats)", "tokens/s", "detail")
    for row in status_rows(load_plan(plan) if plan else None, records_dir, checkpoints_dir):
        table.add_row(*map(_printable, row))
    console.print(table)


@app.command()
def doctor(data_dir: DataDir = DATA) -> None:
    """Show what this machine can do: devices, FP8 tensor cores or emulation, versions, Quarto, data."""
    from fp8lab.doctor import findings

    table = Table("what", "found", "so")
    for finding in findings(data_dir):
        table.add_row(finding.what, finding.found, finding.consequence)
    console.print(table)


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 samples as trained.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 1,
    data_dir: DataDir = DATA,
    checkpoints_dir: CheckpointsDir = CHECKPOINTS,
) -> None:
    """Let a trained model continue a prompt."""
    from fp8lab.generation import generate as continue_prompt
    from fp8lab.training.checkpoint import load_model, trained_encoding

    folder = _run_folder(run, checkpoints_dir)
    model, config = load_model(folder)
    encoding = trained_encoding(folder, config, data_dir)
    text = continue_prompt(
        model, encoding, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    console.print(prompt + text, markup=False, highlight=False)


@app.command()
def evaluate(
    run: RunArgument,
    suite: Annotated[
        Literal["demo", "full"], typer.Option(help="Own items in seconds, or the article's eleven tasks.")
    ] = "full",
    eval_data: EvaluationData = None,
    precision: Annotated[
        Recipe | None, typer.Option(help="Recipe to score in; BF16 if left out, whatever the run trained in.")
    ] = None,
    records_dir: RecordsDir = RECORDS,
    data_dir: DataDir = DATA,
    checkpoints_dir: CheckpointsDir = CHECKPOINTS,
) -> None:
    """Score a finished run with lm-eval, through runs/evaluate.ipynb; the article shows scores in BF16 alone."""
    from fp8lab.running import plans
    from fp8lab.running.workspace import Workspace

    if eval_data is not None and not eval_data.is_dir():
        raise UserError(f"--eval-data: {eval_data} is no folder")
    folder = _run_folder(run, checkpoints_dir)
    workspace = Workspace(records=records_dir, data=data_dir, checkpoints=checkpoints_dir)
    if not plans.evaluate_run(folder, workspace, suite, eval_data, precision, console):
        raise typer.Exit(1)


@app.command()
def speed(
    plan: Annotated[Path, typer.Argument(help="Speed plan (YAML).")],
    occasion: Annotated[
        str | None,
        typer.Option(help="Name of the record; the UTC time if left out. Of one that exists, missing cases are timed."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only cases whose names match this shell pattern ('125M-*'); may be given several times."),
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(min=1, help="Start no rounds and cases after this many seconds.")
    ] = None,
    corpus: Corpus = None,
    eval_data: EvaluationData = None,
    records_dir: RecordsDir = RECORDS,
    data_dir: DataDir = DATA,
    checkpoints_dir: CheckpointsDir = CHECKPOINTS,
) -> None:
    """Time whole optimizer steps (ms) of several recipes in turns, through runs/speed.ipynb."""
    from fp8lab import records
    from fp8lab.running import plans
    from fp8lab.running.workspace import Workspace
    from fp8lab.speed import load_speed_plan, new_occasion, summary

    speed_plan = load_speed_plan(plan)
    speed_plan.only(only or [])
    name, occasion = speed_plan.name, occasion or new_occasion()
    if not re.fullmatch(NAME_PATTERN, occasion):
        raise UserError(f"--occasion: {occasion!r} is no name for a folder; accepted: letters, digits, '.', '_', '-'")
    for mixture in speed_plan.mixtures:
        _build_data(mixture, data_dir, records_dir, corpus, eval_data)
    workspace = Workspace(records=records_dir, data=data_dir, checkpoints=checkpoints_dir)
    done = plans.measure_speed(plan, name, occasion, only or [], budget_seconds, workspace, console)
    folder = records.record_dir(records_dir, name, occasion)
    if done:
        record = records.read(folder)
        assert isinstance(record, records.SpeedRecord)
        for line in summary(record):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{name} {occasion}: {record.status if done else 'failed'}; see {folder / 'speed.ipynb'}")
    if not done:
        raise typer.Exit(1)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    data_dir: DataDir = DATA,
    checkpoints_dir: CheckpointsDir = CHECKPOINTS,
) -> None:
    """Write a trained model as safetensors, config and tokenizer that transformers opens (Qwen3)."""
    from fp8lab.export import export as export_model

    export_model(_run_folder(run, checkpoints_dir), to, data_dir=data_dir)
    console.print(f"wrote {to}")


@app.command()
def publish(
    records_dir: RecordsDir = RECORDS,
    site_dir: Annotated[Path, typer.Option(help="Folder to write the site to.")] = Path("_site"),
) -> None:
    """Execute stale chapters and publish the article (Quarto where installed, else pandoc)."""
    from fp8lab.publish import publish as publish_site

    _expect_records(records_dir)
    index = publish_site(Path.cwd(), records_dir, site_dir)
    console.print(f"article: open {index}")


@data_app.command("build")
def data_build(
    mixture: Annotated[str, typer.Argument(help="A name in runs/mixtures, or a YAML file.")],
    corpus: Corpus = None,
    eval_data: EvaluationData = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Worker processes; all cores if left out.")] = None,
    records_dir: RecordsDir = RECORDS,
    data_dir: DataDir = DATA,
) -> None:
    """Clean, tokenise and shard a mixture; resumes where it was stopped."""
    folder = _build_data(mixture, data_dir, records_dir, corpus, eval_data, processes)
    console.print(f"built {folder}")


@data_app.command("tokenizer")
def data_tokenizer(
    mixture: Annotated[str, typer.Argument(help="A name in runs/mixtures, or a YAML file.")],
    to: Annotated[Path, typer.Option(help="File to write.")],
    vocab_size: Annotated[
        int, typer.Option(min=272, max=65_536, help="Entries, end-of-text included; a multiple of 16.")
    ] = 8192,
    corpus: Corpus = None,
) -> None:
    """Train a byte-level BPE on a mixture's training text."""
    from fp8lab.data import load_mixture, train_tokenizer

    train_tokenizer(load_mixture(mixture), vocab_size, to, corpus_dir=corpus)
    console.print(f"wrote {to}")


def _build_data(
    mixture: str,
    data_dir: Path,
    records_dir: Path,
    corpus: Path | None,
    eval_data: Path | None,
    processes: int | None = None,
) -> Path:
    """Build a mixture where it is not built yet, with progress on the console; returns its folder."""
    from fp8lab.data import build, load_mixture

    return build(
        load_mixture(mixture),
        data_dir,
        corpus_dir=corpus,
        eval_data_dir=eval_data,
        processes=processes,
        records_dir=records_dir,
        console=console,
    )


def _printable(text: str) -> str:
    """Without the characters by which a record's text could command the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _expect_records(records_dir: Path) -> None:
    """A new project has no records yet; any other folder that is missing was mistyped."""
    if records_dir.is_dir():
        return
    if records_dir != RECORDS:
        raise UserError(f"--records-dir: {records_dir} is no folder")
    console.print(f"no records yet in {records_dir}: fp8lab run runs/plans/demo.yaml makes the first")


def _run_folder(run: str, checkpoints_dir: Path) -> Path:
    """Folder of a run given as PLAN/RUN."""
    folder = checkpoints_dir / run
    if ".." in Path(run).parts or not (folder / "config.json").exists():
        known = sorted(
            str(path.parent.relative_to(checkpoints_dir)) for path in checkpoints_dir.glob("*/*/config.json")
        )
        raise UserError(f"{run}: no trained run of that name in {checkpoints_dir}; there: {', '.join(known) or 'none'}")
    return folder


def _print_frame(frame: object) -> None:
    import pandas as pd

    assert isinstance(frame, pd.DataFrame)
    table = Table(*frame.columns)
    rows = [[str(value) for value in row] for row in frame.itertuples(index=False)]
    for row in rows:
        table.add_row(*row)
    # Numbers cut short would be other numbers: a narrow terminal gets a line a run, a file the whole width.
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if needed <= console.width or not console.is_terminal:
        Console(width=max(needed, console.width), markup=False).print(table)
        return
    for name, *values in rows:
        pairs = "; ".join(f"{column}: {value}" for column, value in zip(frame.columns[1:], values, strict=True))
        console.print(Text.assemble((name, "bold"), f"  {pairs}"))


def main() -> None:
    """Entry point: turns the user's mistakes into one line and exit code 2."""
    from fp8lab.running.stage import StageInterrupted

    try:
        app()
    except UserError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        # A folder that was asked for and is a file, say: nobody else's mistake.
        print(f"fp8lab: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except StageInterrupted as interruption:
        print(f"fp8lab: stopped by {interruption}; the same command resumes", file=sys.stderr)
        raise SystemExit(interruption.exit_code) from None


if __name__ == "__main__":
    main()
