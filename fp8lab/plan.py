"""Plans: a few lines of YAML, resolved into runs.

A *plan* (``runs/plans/*.yaml``) is a list of entries, each a cross product of models, recipes and seeds with the
settings they share. `load_plan` resolves it into one `RunConfig` a run. Plans that time models instead of training them
are `fp8lab.speed.plan`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fp8lab.config import (
    Config,
    ModelConfig,
    Name,
    NamedModel,
    Recipe,
    RunConfig,
    matching,
    parameter_count,
    read_run_config,
    read_yaml,
    validate,
)
from fp8lab.errors import UserError
from fp8lab.schedule import decay_start, warmup_steps


class Plan(Config):
    """A resolved plan: what `fp8lab run` executes, in order."""

    name: Name
    description: str
    path: Path
    runs: tuple[RunConfig, ...]

    def __getitem__(self, run: str) -> RunConfig:
        for config in self.runs:
            if config.run == run:
                return config
        raise UserError(f"{self.path}: no run {run!r}; it has {', '.join(c.run for c in self.runs)}")

    def only(self, patterns: Sequence[str]) -> Plan:
        """The plan with those of its runs whose names match one of the shell patterns; all where there are none.

        Raises:
            UserError: a pattern matches no run.
        """
        chosen = matching(self.runs, lambda config: config.run, patterns, f"run of {self.path}")
        return self.model_copy(update={"runs": chosen})


MAX_TOKENS_PER_PARAMETER = 1e6
"""Beyond any training there has been; a plan that asks for more has a typing error in it."""


class _Entry(Config):
    """The keys of a plan's entry that multiply it into runs; the rest are `RunConfig` fields."""

    models: tuple[NamedModel, ...] = Field(min_length=1)
    recipes: tuple[Recipe, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    tokens_per_parameter: float | None = Field(default=None, gt=0, le=MAX_TOKENS_PER_PARAMETER, allow_inf_nan=False)
    learning_rate_at_width_256: float | None = Field(default=None, gt=0)
    """Peak learning rate at d_model 256; at other widths in inverse proportion (as in 2203.03466)."""
    decay_branches_at: tuple[Annotated[float, Field(gt=0, le=MAX_TOKENS_PER_PARAMETER)], ...] = ()
    """Smaller budgets, in tokens a parameter, that branch off each run: they share its warm-up and stable part (WSD)
    and train only their own decay. A branch is named like its run with -d<budget> at the end, is not scored, and keeps
    no average of its weights."""
    suffix: str = ""
    """Ends the names of the entry's runs."""


_SET_BY_ENTRY = {"plan", "run", "model", "recipe", "seed"}
"""Fields of a run that follow from its entry: given there, they would be overwritten without a word."""


class _PlanFile(Config):
    name: Name
    description: str
    defaults: dict[str, Any] = Field(default_factory=dict)
    entries: list[dict[str, Any]] = Field(min_length=1)


def load_plan(path: Path | str, mixture: str | None = None) -> Plan:
    """Read a plan file and resolve it into runs.

    Args:
        path: the plan's YAML file.
        mixture: replaces the mixture of every run.

    Raises:
        UserError: any mistake in the file, naming the field.
    """
    path = Path(path)
    plan_file: _PlanFile = validate(_PlanFile, read_yaml(path), str(path))
    runs: list[RunConfig] = []
    for index, values in enumerate(plan_file.entries):
        merged = _merge(plan_file.defaults, values)
        if mixture is not None:
            merged["mixture"] = mixture
        runs.extend(_expand_entry(merged, plan_file.name, f"{path}: entries[{index}]"))
    names = [config.run for config in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: run {name!r} appears {names.count(name)} times; each run needs a name of its own")
    return Plan(name=plan_file.name, description=plan_file.description, path=path, runs=tuple(runs))


def load_run(plan: Path | str, run: str, mixture: str | None = None) -> RunConfig:
    """One run of a plan, or of the ``config.json`` that a trained run keeps beside its weights.

    Raises:
        UserError: any mistake in the file, or no such run in it.
    """
    if Path(plan).suffix == ".json":
        return read_run_config(Path(plan))
    return load_plan(plan, mixture)[run]


def _expand_entry(values: dict[str, Any], plan: str, where: str) -> list[RunConfig]:
    multipliers = {key: values.pop(key) for key in _Entry.model_fields if key in values}
    run_fields = [key for key in RunConfig.model_fields if key not in _SET_BY_ENTRY]
    for key in values:
        if key not in run_fields:
            raise UserError(
                f"{where}: {key}: unknown field; accepted: {', '.join([*_Entry.model_fields, *run_fields])}"
            )
    entry: _Entry = validate(_Entry, multipliers, where)
    runs: list[RunConfig] = []
    for model in entry.models:
        of_model = _expand_model(entry, model, values, plan, where)
        branches = [_decay_branches(config, entry.decay_branches_at, where) for config in of_model]
        runs += [_keeping(config, of_run) for config, of_run in zip(of_model, branches, strict=True)]
        runs += itertools.chain.from_iterable(branches)
    return runs


def _expand_model(entry: _Entry, model: ModelConfig, values: dict[str, Any], plan: str, where: str) -> list[RunConfig]:
    """The entry's runs of one model."""
    runs = []
    for recipe, seed in itertools.product(entry.recipes, entry.seeds):
        run_values = dict(values)
        if entry.tokens_per_parameter is not None:
            if "tokens" in run_values:
                raise UserError(f"{where}: tokens: give tokens or tokens_per_parameter, not both")
            run_values["tokens"] = round(entry.tokens_per_parameter * parameter_count(model))
        if entry.learning_rate_at_width_256 is not None:
            optimizer = dict(run_values.get("optimizer", {}))
            if "peak_learning_rate" in optimizer:
                raise UserError(
                    f"{where}: optimizer.peak_learning_rate: give it or learning_rate_at_width_256, not both"
                )
            optimizer["peak_learning_rate"] = entry.learning_rate_at_width_256 * 256 / model.d_model
            run_values["optimizer"] = optimizer
        head = run_values.get("head", "bf16")
        name = f"{model.name}-{recipe}{'-head_fp8' if head == 'fp8' else ''}-s{seed}"
        if isinstance(run_values.get("parent"), Mapping):
            run_values["parent"] = {"run": name} | dict(run_values["parent"])
        run_values |= {"plan": plan, "run": name + entry.suffix, "model": model, "recipe": recipe, "seed": seed}
        runs.append(validate(RunConfig, run_values, where))
    return runs


def _decay_branches(config: RunConfig, budgets: tuple[float, ...], where: str) -> list[RunConfig]:
    """Shorter runs that leave `config` where their own decay begins.

    Args:
        budgets: their lengths in tokens a parameter.
    """
    warmup = warmup_steps(config.schedule, config.steps)
    branches = []
    for budget in budgets:
        tokens = round(budget * parameter_count(config.model))
        steps = -(-tokens // config.global_batch_tokens)
        start = decay_start(config.schedule, steps)
        if not warmup < start < decay_start(config.schedule, config.steps):
            raise UserError(
                f"{where}: decay_branches_at: a branch of {budget:g} tokens a parameter would leave {config.run} at "
                f"step {start}, which is not in its stable part"
            )
        # The warm-up that it shares took as many steps of a longer run.
        schedule = config.schedule.model_dump() | {"warmup_fraction": warmup / steps}
        values = config.model_dump() | {"run": f"{config.run}-d{budget:g}", "tokens": tokens, "schedule": schedule}
        values |= {"parent": {"run": config.run, "step": start}, "evaluation": "none", "average_half_life": 0.0}
        branches.append(validate(RunConfig, values, where))
    return branches


def _keeping(config: RunConfig, branches: list[RunConfig]) -> RunConfig:
    """`config` with the checkpoints kept that `branches` start from."""
    steps = {branch.parent.step for branch in branches if branch.parent}
    return config.model_copy(update={"keep_checkpoints_at": tuple(sorted(steps | set(config.keep_checkpoints_at)))})


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`, mappings merged field by field."""
    merged = dict(defaults)
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged
