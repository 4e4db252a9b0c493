"""Training runs, grouped into sets that may be compared.

`training_runs` picks the plan whose runs the article shows: one measured on GPUs where there is one, else the demo's,
never a mixture of both. Differences between precisions are `fp8lab.analysis.comparison.Gap`s: they carry an interval
only where several seeds were trained.
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
from fp8lab.config import RECIPES, FusedConfig, Head, Recipe, recorded_fused
from fp8lab.errors import UserError
from fp8lab.records import TrainRecord
from fp8lab.units import listing, unique

LADDER_PLAN = "ladder-h200"
MEASURED_PLANS = ("article", LADDER_PLAN, "pilot-h200")
"""Plans trained on GPUs that the article draws, the most complete first."""
SEEDS_PLAN = "seeds-h200"
"""Many seeds of the ladder's smallest sizes, at half its learning rate."""
LARGER_PLAN = "125m-h200"
"""A size above the ladder, in another vocabulary."""
EARLY_PLAN = "early-h200"
"""The first minutes of sizes above those."""
EARLY_GRADIENTS_PLAN = "early-gradients-h200"
"""The same with other gradients of ``fused``."""
SCALING_OUT_PLAN = "scaling-out-h200"
DEMO_PLAN = "demo"
DEMO_COMMAND = "fp8lab run runs/plans/demo.yaml"
LADDER_COMMAND = "fp8lab run runs/plans/ladder-h200.yaml"


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

    @cached_property
    def changed_settings(self) -> str:
        """In what ``fused`` differs from its defaults ('gradient_format: e5m2'); empty where in nothing."""
        settings, defaults = recorded_fused(self.record.config), FusedConfig()
        if settings is None:
            return ""
        return "; ".join(
            f"{name}: {_setting_text(value)}" for name, value in settings if value != getattr(defaults, name)
        )

    @property
    def named(self) -> str:
        """Its recipe and what differs from that recipe's defaults, as prose has them."""
        more = [f"`{self.changed_settings}`"] if self.changed_settings else []
        more += ["output head in FP8"] if self.record.head == "fp8" else []
        return f"`{self.recipe}` ({', '.join(more)})" if more else f"`{self.recipe}`"

    @property
    def label(self) -> str:
        """The same for tables and legends: 'fused (gradient_format: e5m2)'."""
        return self.named.replace("`", "")

    @property
    def kind(self) -> tuple[str, Recipe, Head, str, int, str]:
        """What it has in common with the runs that differ from it in their seed alone: size to design."""
        return self.size, self.recipe, self.record.head, self.changed_settings, self.record.tokens, self.design

    @property
    def design_settings(self) -> dict[str, Any]:
        """What makes runs of several plans one design; with precision and seed, one training."""
        names = ("model", "tokens", "optimizer", "schedule", "global_batch_tokens", "micro_batch", "mixture")
        return {name: self.record.config[name] for name in names}

    def design_differences(self, other: Run) -> list[str]:
        """In which of `design_settings` the two differ, or in data. A recipe may need memory, so micro-batches may."""
        settings = other.design_settings.items()
        found = [name for name, value in settings if name != "micro_batch" and value != self.design_settings[name]]
        ours, theirs = self.record.provenance, other.record.provenance
        # Of one design, as many passes over each domain are the same weights.
        data = ((ours.data_sha256, theirs.data_sha256), (ours.epochs, theirs.epochs))
        return found or (["data"] if any(None not in both and both[0] != both[1] for both in data) else [])

    @property
    def tuning(self) -> dict[str, Any]:
        """Optimizer, schedule and batch, the learning rate at width 1 by the rule that carries it from size to size."""
        config = self.record.config
        rate = float(config["optimizer"]["peak_learning_rate"]) * self.record.model.d_model
        optimizer = config["optimizer"] | {"peak_learning_rate": float(f"{rate:.6g}")}
        return {"optimizer": optimizer} | {name: config[name] for name in ("schedule", "global_batch_tokens")}

    @property
    def learning_rate(self) -> float:
        """The highest of the schedule."""
        return float(self.record.config["optimizer"]["peak_learning_rate"])

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
        """lm-eval's results in BF16, or None where the run was not scored in it."""
        if not (self.folder / "eval.json").exists():
            return None
        scores = records.read_eval(self.folder)
        # Earlier versions wrote scores in an FP8 recipe to the same file.
        return scores if scores.get("config", {}).get("precision", "bf16") == "bf16" else None


@dataclass(frozen=True)
class RunSet:
    """The finished runs of a plan, or of plans of one design, by size and then in the order of `config.RECIPES`."""

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
        if differing := ours[0].design_differences(baseline[0]):
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


def _setting_text(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


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
    return Deviation.pooled(seed_groups(sets, like, size=size, below=below))


def source_of(sets: Sequence[RunSet]) -> str:
    """`RunSet.source` of all of them together."""
    runs = tuple(run for runs in sets for run in runs.runs)
    return RunSet("", runs).source if runs else ""


def known_scatter(sets: Sequence[RunSet], like: Run) -> Deviation | None:
    """`seed_deviation` at the size of `like` or, where no such run was repeated, at smaller ones."""
    return seed_deviation(sets, like, size=like.size) or seed_deviation(sets, like, below=like.parameters)


def seed_groups(
    sets: Iterable[RunSet], like: Run, *, size: str | None = None, below: int | None = None
) -> list[list[float]]:
    """The validation losses (nats/token) that `seed_deviation` pools: a list for runs that differ in seed alone."""
    groups: dict[tuple[object, ...], dict[str, float]] = {}
    for run in (run for runs in sets for run in runs.runs):
        wanted = size in (None, run.size) and (below is None or run.parameters < below)
        of_one_design = (run.record.plan, run.design) == (like.record.plan, like.design)
        if wanted and (of_one_design or run.tuning == like.tuning):
            groups.setdefault((run.record.plan, *run.kind), {})[run.record.run] = run.validation_loss
    return [list(losses.values()) for losses in groups.values()]


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
