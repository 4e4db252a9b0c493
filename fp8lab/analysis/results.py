"""What the article draws: records grouped into comparable sets of runs.

`training_runs` picks the plan whose runs the article shows: one measured on GPUs where there is
one, else the demo's, never a mixture of both. `speed_runs` accepts GPU measurements only, since the
speed of emulated FP8 says nothing about FP8.

Differences between precisions are `fp8lab.analysis.comparison.Gap`s: they carry an interval only where several
seeds were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fp8lab import records
from fp8lab.analysis.comparison import Deviation, Gap
from fp8lab.config import RECIPES, Head, Recipe
from fp8lab.errors import UserError
from fp8lab.records import BENCHMARK_PLAN, BenchmarkRecord, DataRecord, SpeedRecord, TestRecord, TrainRecord
from fp8lab.units import listing

MEASURED_PLANS = ("article", "ladder-h200", "pilot-h200")
"""Plans trained on GPUs that the article draws, the most complete first."""
SEEDS_PLAN = "seeds-h200"
"""Many seeds of the ladder's smallest sizes, at half its learning rate."""
LARGER_PLAN = "125m-h200"
"""A size above the ladder, in another vocabulary."""
DEMO_PLAN = "demo"
DEMO_COMMAND = "fp8lab run runs/plans/demo.yaml"
LADDER_COMMAND = "fp8lab run runs/plans/ladder-h200.yaml"
SPEED_PLANS = "speed-"
"""Beginning of the names of the plans that time whole models, each on a device of its own."""
MAP_PLAN = "speed-map"
"""The plan that times blocks of many widths, for the break-even."""
SPEED_COMMAND = "fp8lab speed runs/plans/speed-h200.yaml"
DATA_PLAN = "data"
"""Data builds are recorded under this plan, each as a run with the mixture's name."""
SCALING_OUT_PLAN = "scaling-out-h200"
RELIABILITY_PLAN = "reliability"
FAULT_RUN = "fault-tests"
"""The record that the fault tests wrote themselves."""
FAULT_COMMAND = "make reliability"
BENCHMARK_COMMAND = "python -m fp8lab.benchmark"


@dataclass(frozen=True)
class Run:
    """One training run: its record, and its tables read when asked for."""

    folder: Path
    record: TrainRecord

    @property
    def size(self) -> str:
        """Name of the model: '125M'."""
        return self.record.model.name

    @property
    def recipe(self) -> Recipe:
        return self.record.recipe

    @property
    def mixture(self) -> str:
        """Name of its mixture, whose file a configuration may give instead."""
        return Path(self.record.config["mixture"]).stem

    @property
    def tokenizer(self) -> str | None:
        """SHA-256 of its mixture's tokenizer; None where nothing was trained, or so long ago that no record says it."""
        return self.record.provenance.tokenizer_sha256

    @property
    def parameters(self) -> int:
        """N, the tied embedding counted once."""
        return self.record.parameters.total

    @property
    def design(self) -> str:
        """What the plan's entry put behind the usual name of the run ('low-rate'); empty where it put nothing."""
        head = "-head_fp8" if self.record.head == "fp8" else ""
        return self.record.run.removeprefix(f"{self.size}-{self.recipe}{head}-s{self.record.seed}").removeprefix("-")

    @property
    def kind(self) -> tuple[str, Recipe, Head, int, str]:
        """What it has in common with the runs that differ from it in their seed alone: size to design."""
        return self.size, self.recipe, self.record.head, self.record.tokens, self.design

    @property
    def design_settings(self) -> dict[str, Any]:
        """What makes runs of several plans one design; with precision and seed, one training."""
        names = ("model", "tokens", "optimizer", "schedule", "global_batch_tokens", "micro_batch", "mixture")
        return {name: self.record.config[name] for name in names}

    @property
    def tuning(self) -> dict[str, Any]:
        """Optimizer, schedule and batch, the learning rate at width 1 by the rule that carries it from size to size."""
        config = self.record.config
        rate = float(config["optimizer"]["peak_learning_rate"]) * self.record.model.d_model
        optimizer = config["optimizer"] | {"peak_learning_rate": float(f"{rate:.6g}")}
        return {"optimizer": optimizer} | {name: config[name] for name in ("schedule", "global_batch_tokens")}

    @property
    def validation_loss(self) -> float:
        """Nats a token at the end of the run."""
        return self._final.validation_loss

    @property
    def bits_per_byte(self) -> float:
        return self._final.bits_per_byte

    @property
    def by_domain(self) -> dict[str, records.DomainLoss]:
        return self._final.by_domain

    @property
    def averaged(self) -> records.ValidationLosses | None:
        """Losses of the moving average of the weights, where one was kept."""
        return self._final.averaged

    @property
    def _final(self) -> records.FinalLosses:
        if self.record.final is None:
            raise UserError(f"{self.folder / 'record.json'}: final: missing from a finished run")
        return self.record.final

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row a logged step."""
        return self._table("metrics")

    @cached_property
    def validation(self) -> pd.DataFrame:
        """A row a domain of each validation."""
        return self._table("validation")

    @cached_property
    def health(self) -> pd.DataFrame:
        """A row a measured step, Linear and operand (`fp8lab.training.health`); empty for a run that measured none."""
        if not any((folder / "health.parquet").exists() for folder in (self.folder, self.folder.parent)):
            return pd.DataFrame(columns=list(records.COLUMNS["health"]))
        return self._table("health")

    def _table(self, name: str) -> pd.DataFrame:
        """The run's own table; a plan of many runs keeps one for all, with a column `run`."""
        shared = self.folder.parent / f"{name}.parquet"
        if (self.folder / f"{name}.parquet").exists() or not shared.exists():
            return records.read_table(self.folder, name)
        table = records.read_table(self.folder.parent, name)
        return table[table["run"] == self.record.run].reset_index(drop=True)

    def validation_curve(self, weights: Mapping[str, float]) -> pd.Series:
        """Validation loss (nats/token) by tokens: mean over domains by the mixture's `weights`."""
        by_domain = self.validation.pivot_table(index="tokens", columns="domain", values="loss")
        share = pd.Series(weights)[by_domain.columns]
        return (by_domain * share).sum(axis=1) / share.sum()

    def training_curve(self, windows: int = 60) -> pd.Series:
        """Mean training loss (nats/token) over windows of steps, by tokens at the window's end."""
        width = max(1, len(self.metrics) // windows)
        groups = np.arange(len(self.metrics)) // width
        windowed = self.metrics.groupby(groups).agg({"tokens": "last", "loss": "mean"})
        return windowed.set_index("tokens")["loss"]

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """lm-eval's results, or None where the run was not scored."""
        return records.read_eval(self.folder) if (self.folder / "eval.json").exists() else None


@dataclass(frozen=True)
class RunSet:
    """The finished runs of one plan, by size and then in the order of `config.RECIPES`."""

    plan: str
    runs: tuple[Run, ...]
    unfinished: tuple[Run, ...] = ()
    branches: tuple[Run, ...] = ()
    """Finished decay branches: shorter budgets that share a run's stable part and so are no runs of their own."""
    unfinished_branches: tuple[Run, ...] = ()
    paired_sizes: frozenset[str] = frozenset()
    """Sizes at which gaps are taken over pairs of seeds: decided by other runs (`variance.with_pairs`)."""

    def __bool__(self) -> bool:
        return bool(self.runs)

    @property
    def toy(self) -> bool:
        """True for runs off the GPU: real losses at toy scale, and no speed."""
        return all(run.record.provenance.device_name.upper().startswith("CPU") for run in self.runs)

    @property
    def source(self) -> str:
        """What a caption says about where the numbers come from."""
        if self.toy:
            return "Toy scale, CPU."
        return f"Measured on {', '.join(unique(run.record.provenance.device_name for run in self.runs))}."

    @property
    def sizes(self) -> list[str]:
        """Names of the models, smallest first."""
        return unique(run.size for run in self.runs)

    @property
    def recipes(self) -> list[Recipe]:
        present = {run.recipe for run in self.runs}
        return [recipe for recipe in RECIPES if recipe in present]

    def where(self, *, size: str | None = None, recipe: str | None = None) -> list[Run]:
        """Runs of one size, of one recipe, or of both."""
        return [
            run for run in self.runs if (size is None or run.size == size) and (recipe is None or run.recipe == recipe)
        ]

    def gap(self, size: str, recipe: str, value: Callable[[Run], float] | None = None) -> Gap:
        """`recipe` minus BF16 at `size`, over all their seeds.

        Args:
            value: what is compared; the validation loss (nats/token) if left out.

        Raises:
            UserError: the runs of one side differ in more than their seed, or the sides in tokens or design.
        """
        value = value or (lambda run: run.validation_loss)
        ours, baseline = (self.where(size=size, recipe=name) for name in (recipe, "bf16"))
        other = baseline[0].design_settings
        differing = [name for name, value in ours[0].design_settings.items() if value != other[name]]
        # A recipe may need memory that another does without.
        if differing := [name for name in differing if name != "micro_batch"]:
            raise UserError(f"{_name(ours[0])} and {_name(baseline[0])} differ in {listing(differing)}")
        return Gap.by_seed(by_seed(ours, value), by_seed(baseline, value), paired=size in self.paired_sizes)

    def gaps(self) -> dict[tuple[str, str], Gap]:
        """`gap` for every size and FP8 recipe that has a BF16 run beside it."""
        return {
            (size, recipe): self.gap(size, recipe)
            for size in self.sizes
            for recipe in self.recipes
            if recipe != "bf16" and self.where(size=size, recipe=recipe) and self.where(size=size, recipe="bf16")
        }


def by_seed(runs: Iterable[Run], value: Callable[[Run], float]) -> dict[int, float]:
    """`value` of runs that differ in their seed alone.

    Raises:
        UserError: two of them have one seed, or differ in size, recipe, head, tokens or design.
    """
    seeds: dict[int, Run] = {}
    for run in runs:
        first = next(iter(seeds.values()), run)
        if run.kind != first.kind:
            raise UserError(f"{_name(first)} and {_name(run)} differ in more than their seed")
        if run.record.seed in seeds:
            raise UserError(f"{_name(seeds[run.record.seed])} and {_name(run)} differ in nothing but their name")
        seeds[run.record.seed] = run
    return {seed: value(run) for seed, run in seeds.items()}


def _name(run: Run) -> str:
    return f"{run.record.plan}/{run.record.run}"


def seed_deviation(
    sets: Iterable[RunSet], like: Run, *, size: str | None = None, below: int | None = None
) -> Deviation | None:
    """Scatter of validation losses between runs alike but for their seed, pooled over plans, sizes and recipes.

    Args:
        sets: where to look; a run that is in several counts once.
        like: only runs tuned as this one, since runs scatter less where the learning rate is lower: those of its plan
            and design, whatever rate the plan gives each size, and those of other plans by `Run.tuning`.
        size: only this model.
        below: only models with fewer parameters.

    Returns:
        None where no such runs have two seeds.
    """
    groups: dict[tuple[object, ...], dict[str, float]] = {}
    for run in (run for runs in sets for run in runs.runs):
        wanted = size in (None, run.size) and (below is None or run.parameters < below)
        of_one_design = (run.record.plan, run.design) == (like.record.plan, like.design)
        if wanted and (of_one_design or run.tuning == like.tuning):
            groups.setdefault((run.record.plan, *run.kind), {})[run.record.run] = run.validation_loss
    return Deviation.pooled([list(losses.values()) for losses in groups.values()])


def training_runs(
    records_dir: Path,
    plans: Iterable[str] = (*MEASURED_PLANS, DEMO_PLAN),
    *,
    suits: Callable[[RunSet], bool] = bool,
) -> RunSet:
    """The first of `plans` in which BF16 and an FP8 recipe both finished; an empty set where none did.

    Where such runs were made on a GPU, the demo's are never shown, not even where those do not suit.

    Args:
        suits: whether a plan's runs can show what a chapter needs, for example enough sizes.
    """
    compared = [runs for plan in plans if "bf16" in (runs := plan_runs(records_dir, plan)).recipes]
    compared = [runs for runs in compared if len(runs.recipes) > 1]
    measured = [runs for runs in compared if not runs.toy]
    return next((runs for runs in measured or compared if suits(runs)), RunSet(plan=DEMO_PLAN, runs=()))


def has_ladder(runs: RunSet) -> bool:
    """Whether BF16 finished at sizes enough for a trend: three."""
    return len({run.size for run in runs.where(recipe="bf16")}) > 2


def training_command(records_dir: Path) -> str:
    """What makes the runs that a chapter lacks: the ladder beside runs made on a GPU, else the demo."""
    shown = training_runs(records_dir)
    return LADDER_COMMAND if shown and not shown.toy else DEMO_COMMAND


def plan_runs(records_dir: Path, plan: str) -> RunSet:
    """Every training run of one plan, and the decay branches apart from them; none that is outdated."""
    read = _read_runs(records_dir, plan)
    outdated = _outdated(read)
    found = sorted(
        (run for run in read if run not in outdated),
        key=lambda run: (run.parameters, RECIPES.index(run.recipe), run.record.seed, run.record.tokens),
    )
    runs = [run for run in found if run.record.parent is None]
    branches = [run for run in found if run.record.parent is not None]
    return RunSet(
        plan,
        runs=tuple(run for run in runs if run.record.status == "finished"),
        unfinished=tuple(run for run in runs if run.record.status != "finished"),
        branches=tuple(run for run in branches if run.record.status == "finished"),
        unfinished_branches=tuple(run for run in branches if run.record.status != "finished"),
    )


def outdated_runs(records_dir: Path) -> list[str]:
    """Runs that no set of runs holds, ``<plan>/<run>``: later ones of their plan and mixture have another tokenizer."""
    plans = sorted({path.parts[-3] for path in records_dir.glob("*/*/record.json")})
    return [f"{plan}/{run.record.run}" for plan in plans for run in _outdated(_read_runs(records_dir, plan))]


def _read_runs(records_dir: Path, plan: str) -> list[Run]:
    return [
        Run(folder, record)
        for folder, record in records.read_plan(records_dir, plan)
        if isinstance(record, TrainRecord)
    ]


def _outdated(runs: Sequence[Run]) -> list[Run]:
    """Those whose tokenizer is not that of their mixture's latest finished run: their nats a token do not compare."""
    latest: dict[str, str] = {}
    for run in sorted(runs, key=lambda run: run.record.provenance.started_utc):
        if run.record.status == "finished" and run.tokenizer is not None:
            latest[run.mixture] = run.tokenizer
    return [run for run in runs if run.tokenizer not in (None, latest.get(run.mixture, run.tokenizer))]


def scored_runs(records_dir: Path, plans: Iterable[str] = (*MEASURED_PLANS, DEMO_PLAN)) -> RunSet:
    """The scored runs of the first of `plans` that has any; one precision alone has scores worth showing too."""
    for plan in plans:
        runs = plan_runs(records_dir, plan)
        scored = tuple(run for run in runs.runs if run.evaluation is not None)
        if scored:
            return RunSet(plan, scored)
    return RunSet(plan=DEMO_PLAN, runs=())


def data_record(records_dir: Path, runs: RunSet) -> DataRecord | None:
    """What the build of the mixture that `runs` trained on recorded, or None."""
    for mixture in unique(run.mixture for run in runs.runs):
        folder = records.record_dir(records_dir, DATA_PLAN, mixture)
        if (folder / "record.json").exists():
            record = records.read(folder)
            if isinstance(record, DataRecord):
                return record
    return None


def bytes_per_token(record: DataRecord) -> float:
    """Bytes of training text that a token stands for, the domains in the shares that training draws them in.

    Raises:
        UserError: a domain or field is missing.
    """
    try:
        return sum(
            record.config["domains"][domain]["weight"] * values["train"]["text_bytes"] / values["train"]["tokens"]
            for domain, values in record.results["domains"].items()
        )
    except KeyError as error:
        raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None


def data_composition(record: DataRecord) -> pd.DataFrame:
    """A row a domain of a data set.

    Args:
        record: its `results` are the data set's manifest, its `config` the mixture.

    Returns:
        Columns: domain, weight (share of each batch), documents, train_tokens, validation_tokens, removed
        (documents), contaminated (documents that share text with an evaluation item; among the removed).

    Raises:
        UserError: a domain or field is missing.
    """
    try:
        rows = [
            {
                "domain": domain,
                "weight": float(record.config["domains"][domain]["weight"]),
                "documents": values["train"]["documents"],
                "train_tokens": values["train"]["tokens"],
                "validation_tokens": values["validation"]["tokens"],
                "removed": sum(values["removed"].values()),
                "contaminated": values["removed"]["contaminated"],
            }
            for domain, values in record.results["domains"].items()
        ]
    except KeyError as error:
        raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows)


def data_benchmarks(records_dir: Path) -> list[BenchmarkRecord]:
    """What `fp8lab.data.benchmark` measured, by name."""
    return _benchmarks(records_dir, "data-")


def trainer_benchmarks(records_dir: Path) -> list[BenchmarkRecord]:
    """What `fp8lab.benchmark` measured on GPUs, by name: off them it measures nothing that a reader wants to know."""
    return [
        record
        for record in _benchmarks(records_dir, "trainer-")
        if not record.provenance.device_name.upper().startswith("CPU")
    ]


def _benchmarks(records_dir: Path, prefix: str) -> list[BenchmarkRecord]:
    found = (record for _, record in records.read_plan(records_dir, BENCHMARK_PLAN))
    return [record for record in found if isinstance(record, BenchmarkRecord) and record.run.startswith(prefix)]


def fault_record(records_dir: Path) -> TestRecord | None:
    """What the fault tests saw, or None where they have written no record."""
    folder = records.record_dir(records_dir, RELIABILITY_PLAN, FAULT_RUN)
    if not (folder / "record.json").exists():
        return None
    record = records.read(folder)
    return record if isinstance(record, TestRecord) else None


UNSAID_KERNELS = dict.fromkeys(("fdd9729", "33acd60"), "of 2026-11-27")
"""Of records that do not say which kernels they timed: commits whose kernels are the same."""


@dataclass(frozen=True)
class SpeedRun:
    """One process that measured speed."""

    folder: Path
    record: SpeedRecord

    @property
    def device(self) -> str:
        return self.record.provenance.device_name

    @property
    def span(self) -> tuple[str, str]:
        """When it began and ended, UTC in ISO 8601."""
        return self.record.provenance.started_utc, self.record.provenance.ended_utc

    @property
    def kernels(self) -> str:
        """Version of this project's kernels. Of records that do not say it, `UNSAID_KERNELS` or the commit."""
        provenance = self.record.provenance
        unsaid = UNSAID_KERNELS.get(provenance.git_commit[:7], provenance.git_commit)
        return provenance.versions.get(records.KERNELS, unsaid)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Every timed step, with its device and occasion."""
        occasion = f"{self.record.plan}/{self.record.run}"
        return records.read_table(self.folder, "steps").assign(device=self.device, occasion=occasion)

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """Results of the cases that could be measured, by name ('1.5B-T2048-B16')."""
        cases = self.record.results.get("cases", {})
        return {name: results for name, results in cases.items() if results.get("contestants")}

    def profiles(self) -> dict[str, dict[str, dict[str, float]]]:
        """case -> contestant -> category -> GPU milliseconds a step, where they were profiled."""
        return {
            case: {
                name: contestant["profile"]["ms_by_category"]
                for name, contestant in results["contestants"].items()
                if contestant.get("profile")
            }
            for case, results in self.cases.items()
        }

    @property
    def peers(self) -> dict[str, str]:
        """Version of each peer that was timed, by recipe."""
        return {recipe: version for case in self.cases.values() for recipe, version in case.get("peers", {}).items()}

    def failures(self) -> dict[str, str]:
        """What could not be timed ('1.5B-T2048-B16' or '1.5B-T2048-B16, rowwise') and its error."""
        failures = {}
        for case, results in self.record.results.get("cases", {}).items():
            if "error" in results:
                failures[case] = results["error"]
            for contestant, failure in results.get("errors", {}).items():
                failures[f"{case}, {contestant}"] = failure["error"]
        return failures


def speed_runs(records_dir: Path, plan: str | None = None) -> list[SpeedRun]:
    """Measurements of speed with FP8 in hardware; what was emulated or failed is left out.

    A measurement that its time budget ended holds whole rounds of the cases that it reached, and counts.

    Args:
        plan: the plan whose occasions are wanted; those of every plan that times whole models if None.
    """
    folders = sorted(folder.name for folder in records_dir.glob(f"{SPEED_PLANS}*") if folder.is_dir())
    plans = [plan] if plan else [name for name in folders if name != MAP_PLAN]
    return [
        SpeedRun(folder, record)
        for name in plans
        for folder, record in records.read_plan(records_dir, name)
        if isinstance(record, SpeedRecord)
        and record.status in ("finished", "interrupted")
        and record.results.get("emulated") is False
    ]


def unique(values: Iterable[str]) -> list[str]:
    """Values in order of first appearance, each once."""
    return list(dict.fromkeys(values))
