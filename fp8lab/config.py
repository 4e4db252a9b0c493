"""Validated configuration: models, and everything that one training run depends on.

A run's `RunConfig` implies nothing, and is copied whole into its record. `fp8lab.plan` makes runs of the few lines that
a plan needs.

Every mistake raises `UserError` with one line that names the file, the field and the accepted
values, before anything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from fp8lab.errors import UserError
from fp8lab.schedule import decay_start, warmup_steps

Recipe = Literal["bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp", "fused"]
Head = Literal["bf16", "fp8"]
Sharding = Literal["ddp", "fsdp"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
HEADS: tuple[Head, ...] = get_args(Head)

# A name becomes a folder: it must not be able to leave the folder it is given.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=80)]

MARKUP = re.compile(r"[<\[\]{}`$|\\\x00-\x1f\x7f]|script:", re.IGNORECASE)
"""What Markdown, HTML, Quarto or a formula in a figure could take for more than text: no record may hold it."""


def _without_markup(text: str) -> str:
    if mark := MARKUP.search(text):
        raise ValueError(f"{mark[0]!r} cannot be in a record, which pages are made from; give a path without it")
    return text


Mixture = Annotated[str, AfterValidator(_without_markup)]
"""Name of a file in runs/mixtures, or a path to one."""


class Config(BaseModel):
    """Immutable, no unknown fields; the docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Config):
    """Dimensions of one GPT. Everything else about the model is fixed (see `fp8lab.model`)."""

    name: Name
    """Short name, by total parameters: '125M'."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Number of blocks."""
    n_heads: int = Field(gt=0)
    """Attention heads; the head dimension is d_model / n_heads and must be even (RoPE)."""
    d_ff: int = Field(gt=0)
    """Inner width of the SwiGLU MLP."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding, padding included."""
    seq_len: int = Field(gt=0)
    """Context length in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension d_model / n_heads = {self.head_dim} must be even for RoPE")
        return self

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


GPT2_VOCAB_PADDED = 50_304
LADDER_VOCAB = 8_192


def _gpt2(name: str, n_layers: int, d_model: int, n_heads: int, d_ff: int, seq_len: int = 1024) -> ModelConfig:
    return ModelConfig(
        name=name,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=d_ff,
        vocab_size=GPT2_VOCAB_PADDED,
        seq_len=seq_len,
    )


def _ladder(name: str, n_layers: int, d_model: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // 64,
        d_ff=d_ff,
        vocab_size=LADDER_VOCAB,
        seq_len=1024,
    )


MODELS: dict[str, ModelConfig] = {
    model.name: model
    for model in (
        # The one-GPU ladder: with GPT-2's 50k vocabulary the head would be most of these models.
        _ladder("7M", 6, 256, 704),
        _ladder("13M", 8, 320, 896),
        _ladder("19M", 9, 384, 1024),
        _ladder("28M", 10, 448, 1216),
        _ladder("48M", 11, 576, 1536),
        # The source article's sizes.
        _gpt2("125M", 12, 768, 12, 2048),
        _gpt2("250M", 16, 1024, 16, 2816),
        _gpt2("350M", 24, 1024, 16, 2816),
        _gpt2("1.5B", 28, 2048, 16, 5632),
    )
}
"""Named sizes that a plan may refer to by name alone."""


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter, 1711.05101)."""

    peak_learning_rate: float = Field(gt=0)
    """Learning rate at the end of warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; on matrices only, never on norm gains."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of mean(logsumexp(logits)^2) (PaLM, 2204.02311, section 5)."""
    skip_outliers: float | None = Field(default=None, gt=0)
    """Skip a step whose loss or gradient norm is this many standard deviations above the mean of the last 128."""


class ScheduleConfig(Config):
    """Learning rate against progress through the run's tokens."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """Cosine to final_fraction, or warm-up, stable, linear decay (WSD: 2404.06395)."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly from 0."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """WSD only: share of the steps over which the rate falls linearly."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Rate at the last step as a fraction of the peak."""

    @model_validator(mode="after")
    def _warms_up_before_decaying(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction:g} and decay_fraction {self.decay_fraction:g} add up to more "
                "than 1: the rate would fall before it has risen"
            )
        return self


Gemm = Literal["output", "grad_input", "grad_weight"]
"""Of a Linear (see `fp8lab.precision`)."""
GEMMS: tuple[Gemm, ...] = get_args(Gemm)
Fp8Format = Literal["e4m3", "e5m2"]


class FusedConfig(Config):
    """How the blocks of the recipe ``fused`` compute (`fp8lab.kernels`). Other recipes and the FP8 head ignore it."""

    gradient_format: Fp8Format = "e4m3"
    """E4M3 has a mantissa bit more than E5M2 and 2^18 between its largest and smallest numbers instead of 2^32.

    Which of the two a loss needs is for runs to say: with one scale a tensor, what lies farther below the largest
    gradient than the format spans is lost. DeepSeek-V3 (2412.19437, section 3.3.2) uses E4M3 throughout, with a scale
    for every 128 values of a gradient.
    """
    history: int = Field(default=16, gt=0)
    """Steps whose largest amax sets the scale."""
    margin: int = Field(default=1, ge=0)
    """Powers of two left free above that amax, for a step that exceeds it. Costs range, not precision."""
    power_of_two_scales: bool = True
    """Round scales down to powers of two: scaling then rounds nothing."""
    fast_accumulation: tuple[Gemm, ...] = GEMMS
    """GEMMs whose sums stay in the tensor cores to the end, instead of being added up in FP32 every so often.

    What that loses grows with the length of the sums, and a weight gradient's have as many terms as a micro-batch has
    tokens (see `fp8lab.kernels`).
    """

    @field_validator("fast_accumulation")
    @classmethod
    def _in_one_order(cls, gemms: tuple[Gemm, ...]) -> tuple[Gemm, ...]:
        return tuple(gemm for gemm in GEMMS if gemm in gemms)

    recompute_rotated_from: int = Field(default=2048, ge=0)
    """Width from which q and k are rotated again in backward instead of kept.

    One more pass over them: under 1% of a step at width 2048, and more at smaller ones, which need the memory less.
    """
    bf16_output_gradient_below: int = Field(default=1024, ge=0)
    """Width below which the output projection's weight gradient stays in BF16.

    It has d_model^2 outputs: too few tiles to fill a GPU with FP8 GEMMs, and its BF16 operands exist anyway.
    """


UNSAID_FUSED: dict[str, Any] = {
    "gradient_format": "e4m3",
    "history": 16,
    "margin": 1,
    "power_of_two_scales": True,
    "fast_accumulation": ("output", "grad_input", "grad_weight"),
    "recompute_rotated_from": 2048,
    "bf16_output_gradient_below": 1024,
}
"""How ``fused`` computed in records whose configuration does not say so."""


def recorded_fused(config: Mapping[str, Any], where: str = "a record: config") -> FusedConfig | None:
    """How the blocks of a recorded run computed, by its configuration; None for another recipe than ``fused``."""
    if config.get("recipe") != "fused":
        return None
    return validate(FusedConfig, UNSAID_FUSED | config.get("fused", {}), f"{where}: fused")


class ParentConfig(Config):
    """Where a decay branch leaves the run that it shares its warm-up and stable part with."""

    run: Name
    """A WSD run of the same plan, alike in all but its length. In a plan's entry, left out: the name without suffix."""
    step: int = Field(gt=0)
    """Continue from its checkpoint after this step."""


class RunConfig(Config):
    """Everything that one training run depends on."""

    plan: Name
    """Plan the run belongs to."""
    run: Name
    """Name of the run: its folder in the plan's records."""
    model: ModelConfig
    recipe: Recipe
    """Precision of the linear layers' GEMMs (see `fp8lab.precision`)."""
    head: Head = "bf16"
    """Precision of the output head's GEMMs."""
    fused: FusedConfig = FusedConfig()
    """How the recipe ``fused`` computes; an error beside another recipe, which would ignore it."""
    high_precision: tuple[str, ...] = ()
    """Linears to leave in BF16: shell patterns on their names ('blocks.0.*'). One that matches nothing is an error."""
    seed: int = Field(ge=0)
    """Seeds the weights and the order of the data."""
    mixture: Mixture
    """Name of a file in runs/mixtures, or a path to one."""
    tokens: int = Field(gt=0, le=10**18)
    """Training tokens; rounded up to whole global batches."""
    global_batch_tokens: int = Field(gt=0)
    """Tokens an optimizer step, over all GPUs and micro-steps."""
    micro_batch: int = Field(gt=0)
    """Sequences a GPU holds at once."""
    sharding: Sharding = "ddp"
    """Of several GPUs, each holds all of the state (ddp) or its share (fsdp).

    With fsdp some is whole on each GPU nevertheless: the embedding, `fused`'s FP8 weights (2 bytes each), and while
    it validates all weights (4 bytes each). See `fp8lab.training.distributed`.
    """
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    activation_checkpointing: bool = False
    """Recompute each block in backward: less memory, about a third more compute."""
    compile: bool = True
    """torch.compile each block."""
    average_half_life: float = Field(default=0.0, ge=0, lt=1)
    """Half-life, as a share of the steps, of an exponential moving average of the weights, validated at the end.

    Beside the weights themselves, so that one run tells what averaging does. 0: none is kept, as by decay branches.
    """
    validation_tokens: int = Field(default=65_536, gt=0)
    """Validation tokens a domain."""
    validation_interval: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the end."""
    log_interval: int = Field(default=1, gt=0)
    """Steps between rows of metrics.parquet."""
    health_interval: int = Field(default=100, ge=0)
    """Steps between rows of health.parquet (`fp8lab.training.health`); 0: none."""
    health_layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Linears to measure: shell patterns on names ('blocks.0.*', '*.down'). One that matches nothing is an error."""
    checkpoint_interval: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints_at: tuple[int, ...] = ()
    """Checkpoint after these steps too and keep them: decay branches start there. Of the others the last two stay."""
    parent: ParentConfig | None = None
    """Set for a decay branch: trains only the steps after the parent's."""
    evaluation: Literal["none", "demo", "full"] = "none"
    """lm-eval suite that scores the finished run."""
    compact: bool = False
    """For plans of many short runs: keep a finished run's record alone, without weights, samples and notebook.

    Its tables go into those that the plan's runs share. Of one GPU each, an entry's compact runs train one after
    another in one process a job (`fp8lab.training.series`), so that its start and compilation are paid once.
    """

    @model_validator(mode="after")
    def _fused_is_for_fused(self) -> RunConfig:
        if self.recipe != "fused" and self.fused != FusedConfig():
            raise ValueError(f"fused: recipe {self.recipe} would ignore it")
        return self

    @model_validator(mode="after")
    def _batch_is_whole_sequences(self) -> RunConfig:
        sequence_tokens = self.micro_batch * self.model.seq_len
        if self.global_batch_tokens % sequence_tokens:
            raise ValueError(
                f"global_batch_tokens {self.global_batch_tokens} is not a multiple of "
                f"micro_batch x seq_len = {self.micro_batch} x {self.model.seq_len} = {sequence_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _compact_keeps_nothing(self) -> RunConfig:
        if self.compact and (self.evaluation != "none" or self.keep_checkpoints_at or self.parent):
            raise ValueError("compact: keeps no weights to score or to branch from; leave evaluation and branches out")
        return self

    @model_validator(mode="after")
    def _branch_decays(self) -> RunConfig:
        if self.parent is None:
            return self
        if self.schedule.kind != "wsd":
            raise ValueError("parent: a decay branch needs schedule.kind wsd")
        warmup, start = warmup_steps(self.schedule, self.steps), decay_start(self.schedule, self.steps)
        if self.parent.step > start:
            raise ValueError(
                f"parent.step {self.parent.step} is after this run's decay begins, at step {start} of {self.steps}"
            )
        if self.parent.step < warmup:
            raise ValueError(
                f"parent.step {self.parent.step} is before this run's warm-up ends, at step {warmup} of {self.steps}: "
                "schedule.warmup_fraction is a share of the branch's own length"
            )
        if self.average_half_life:
            raise ValueError(
                "average_half_life: give none with parent: the average up to there has its parent's half-life"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps: `tokens` in whole global batches, rounded up."""
        return -(-self.tokens // self.global_batch_tokens)

    @property
    def own_steps(self) -> int:
        """Steps that this run itself takes: of a decay branch those after its parent's."""
        return self.steps - (self.parent.step if self.parent else 0)


MAY_CHANGE = {
    "checkpoint_interval",
    "keep_checkpoints_at",
    "evaluation",
    "validation_interval",
    "compact",
    "health_interval",
    "health_layers",
    "sharding",
}
"""Fields that change no result: a run may be resumed, or counts as finished, with other values of them."""


def changed_fields(before: RunConfig, now: RunConfig, may_change: Set[str] = MAY_CHANGE) -> list[str]:
    """Fields that matter to a result and in which two configurations differ."""
    return [
        field
        for field in RunConfig.model_fields
        if field not in may_change and getattr(before, field) != getattr(now, field)
    ]


def earlier_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration that an earlier version wrote.

    A field newer than that then had what is now its default, `fused` what `recorded_fused` says.

    Raises:
        UserError: it is no configuration of a run.
    """
    known = {field: value for field, value in values.items() if field in RunConfig.model_fields}
    known["fused"] = recorded_fused(values, where) or FusedConfig()
    return validate(RunConfig, known, where)


ItemT = TypeVar("ItemT")


def matching(
    items: Iterable[ItemT], name: Callable[[ItemT], str], patterns: Sequence[str], what: str
) -> tuple[ItemT, ...]:
    """Those of `items` whose names match one of the shell patterns of ``--only``; all where there are none.

    Args:
        what: what they are, for the message: 'run of plan.yaml'.

    Raises:
        UserError: a pattern matches none.
    """
    named = [(name(item), item) for item in items]
    for pattern in patterns:
        if not any(fnmatchcase(own, pattern) for own, _ in named):
            names = ", ".join(own for own, _ in named)
            raise UserError(f"--only: {pattern!r} matches no {what}; it has {names}")
    return tuple(item for own, item in named if any(fnmatchcase(own, pattern) for pattern in patterns or "*"))


ConfigT = TypeVar("ConfigT", bound=Config)


def validate(cls: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Build `cls` from parsed YAML or JSON.

    Raises:
        UserError: one line, '<where>: <field>: <what is wrong and what is accepted>'.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        given = "" if isinstance(first["input"], Mapping | BaseModel) else f" (given: {first['input']!r})"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown field; accepted: {', '.join(_accepted_fields(cls, first['loc']))}"
            given = ""
        raise UserError(f"{where}: {field + ': ' if field else ''}{message}{given}") from None


def _accepted_fields(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model in which `location`'s last part stands."""
    for part in location[:-1]:
        field = cls.model_fields.get(str(part))
        if field is not None:
            cls = _model_in(field.annotation) or cls
    return list(cls.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone or in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, parsed without the power to construct objects.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of fields at the top level")
    return values


def read_run_config(path: Path) -> RunConfig:
    """The resolved configuration saved beside trained weights.

    Raises:
        UserError: the file is missing, damaged or not a run's configuration.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: truncated or not JSON ({error})") from None
    return validate(RunConfig, values, str(path))


def _model_of_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in MODELS:
        raise ValueError(f"no model {value!r}; known: {', '.join(MODELS)}")
    return MODELS[value]


NamedModel = Annotated[ModelConfig, BeforeValidator(_model_of_name)]
"""A model in a plan: the name of one of `MODELS`, or its dimensions."""


def parameter_count(model: ModelConfig) -> int:
    """N: every trained number once, the tied embedding included once."""
    attention = 4 * model.d_model**2 + 2 * model.head_dim
    mlp = 3 * model.d_model * model.d_ff
    norms = 2 * model.d_model
    return model.vocab_size * model.d_model + model.n_layers * (attention + mlp + norms) + model.d_model
