"""What to time: cases of a model, a batch and its contestants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from fp8lab.config import Config, Head, Mixture, ModelConfig, Name, NamedModel, Recipe, matching, read_yaml, validate
from fp8lab.units import listing


class Contestant(Config):
    """One recipe in the comparison."""

    recipe: (
        Recipe
        | Literal["tensorwise_fast", "fused_precise", "fused_e5m2", "te_bf16", "te_current", "te_delayed", "nanochat"]
    )
    """A recipe of `fp8lab.precision`; or a variant of one or a peer (`fp8lab.speed.contestants`)."""
    head: Head = "bf16"
    """Precision of the output head's GEMMs."""

    @property
    def name(self) -> str:
        return self.recipe + ("-head_fp8" if self.head == "fp8" else "")


class SpeedCase(Config):
    """One model and batch, and who runs it."""

    model: NamedModel
    """A named size, or dimensions of one's own."""
    seq_len: int | None = Field(default=None, gt=0)
    """Context length in tokens; the model's own if left out."""
    micro_batch: int = Field(gt=0)
    """Sequences a step."""
    mixture: Mixture | None = None
    """Mixture whose training tokens are used, in place of the plan's: one whose vocabulary is the model's."""
    contestants: tuple[Contestant, ...] = Field(min_length=1)
    """In the order in which they take turns; ratios are to BF16."""

    @field_validator("contestants")
    @classmethod
    def _names_are_unique(cls, contestants: tuple[Contestant, ...]) -> tuple[Contestant, ...]:
        _refuse_repeated([contestant.name for contestant in contestants])
        return contestants

    @property
    def sized_model(self) -> ModelConfig:
        return self.model.model_copy(update={"seq_len": self.seq_len or self.model.seq_len})

    @property
    def name(self) -> str:
        return f"{self.model.name}-T{self.sized_model.seq_len}-B{self.micro_batch}"

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.sized_model.seq_len * self.micro_batch


class SpeedPlan(Config):
    """What to time."""

    name: Name
    description: str
    mixture: Mixture | None = None
    """Mixture whose training tokens are used; random ids if left out, or where its vocabulary exceeds the model's."""
    cases: tuple[SpeedCase, ...] = Field(min_length=1)
    """In order of importance: a time budget cuts the last."""
    rounds: int = Field(default=6, gt=0)
    """Turns of each contestant."""
    steps_per_round: int = Field(default=5, gt=0)
    """Timed steps a turn, at least."""
    seconds_per_turn: float = Field(default=0.0, ge=0)
    """About how long a turn's timed steps last: more of them where they are short, so that their median is not that of
    the first moments after a change of contestant."""
    heat_up_seconds: float = Field(default=0.0, ge=0)
    """Untimed turns before the first round: at its power limit a GPU lowers its clock for a while."""
    warmup_steps: int = Field(default=10, gt=0)
    """Steps from the initial weights, untimed, whose losses are recorded."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Constant."""
    compile: bool = True
    """torch.compile what is not compiled already: the blocks of other recipes than fused, and the last norm."""
    seed: int = 1
    """Of the weights, and of the random ids."""

    @field_validator("cases")
    @classmethod
    def _names_are_unique(cls, cases: tuple[SpeedCase, ...]) -> tuple[SpeedCase, ...]:
        _refuse_repeated([case.name for case in cases])
        return cases

    @property
    def mixtures(self) -> list[str]:
        """The mixtures that the cases use, each once."""
        names = [case.mixture or self.mixture for case in self.cases]
        return list(dict.fromkeys(name for name in names if name is not None))

    def only(self, patterns: Sequence[str]) -> tuple[SpeedCase, ...]:
        """The cases whose names match one of the shell patterns; all where there are none.

        Raises:
            UserError: a pattern matches no case.
        """
        return matching(self.cases, lambda case: case.name, patterns, f"case of {self.name}")


def load_speed_plan(path: Path) -> SpeedPlan:
    """Read a speed plan.

    Raises:
        UserError: any mistake in the file, naming the field.
    """
    return validate(SpeedPlan, read_yaml(path), str(path))


def _refuse_repeated(names: Sequence[str]) -> None:
    """Results are kept by name: the second of two that share one would never be timed."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{listing(repeated)} more than once")
