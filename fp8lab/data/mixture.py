"""What a mixture is: domains with weights, where each domain's text comes from, and the tokenizer.

A mixture file (``runs/mixtures/*.yaml``) says everything that decides the tokens. The weights are shares of
*training tokens*; they decide what the loader draws, not what is built, so changing one needs no new build.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from fp8lab.config import Config, Name, read_yaml, validate
from fp8lab.errors import UserError

MIXTURES = Path("runs/mixtures")


class InstalledSource(Config):
    """Text that every installation of this project already holds: no download (see `fp8lab.data.installed`)."""

    kind: Literal["installed"]
    collection: Literal["prose", "python", "c", "science"]
    """prose: packages' long descriptions and Python's help topics; python: the standard library's sources;
    c: C and C++ headers and sources that packages ship; science: docstrings with mathematics."""
    packages: tuple[str, ...] = ()
    """c and science: the packages to read (a subfolder may follow: 'torch/include/c10')."""
    held_out: tuple[str, ...] = Field(min_length=1)
    """Packages (python: top-level modules) whose text is validation text, and never training text."""
    max_bytes: int = Field(gt=0)
    """Most bytes of training text."""
    max_validation_bytes: int = Field(gt=0)
    """Most bytes of validation text."""


class JsonlSource(Config):
    """Local JSON lines, ``.jsonl`` or ``.jsonl.zst``, under the corpus folder that the build is given."""

    kind: Literal["jsonl"]
    train: tuple[str, ...] = Field(min_length=1)
    """Shell patterns of the training files, relative to the corpus folder."""
    validation: tuple[str, ...] = ()
    """Shell patterns of the validation files. Without any, `validation_fraction` of the documents is held out."""
    validation_fraction: float = Field(default=0.002, gt=0, lt=0.5)
    """Share of the documents held out, chosen by the hash of their content; used where no validation files are."""
    text_field: str = "text"
    licence: str
    """Licence of the text."""


class HubSource(Config):
    """A data set of the Hugging Face hub, streamed; or a local folder laid out as one."""

    kind: Literal["hub"]
    dataset: str
    """Name on the hub, or a folder."""
    subset: str | None = None
    """The data set's configuration, where it has several."""
    data_files: tuple[str, ...] = ()
    """Shell patterns of the files inside the data set to read; all of the split without any."""
    where: dict[str, str] = Field(default={})
    """Values that a row must have, by column; a dot enters a nested one ('metadata.language')."""
    revision: str
    """Branch, tag or commit. A commit is the only one that stays what it was."""
    split: str = "train"
    text_field: str = "text"
    licence: str
    """Licence of the text, as the data set's card states it."""
    parts: int = Field(default=16, gt=0)
    """Pieces that are tokenised side by side, at most the data set's files; each yields its share of `max_tokens`."""
    max_tokens: int = Field(gt=0)
    """Training tokens to build."""
    validation_fraction: float = Field(default=0.0005, gt=0, lt=0.5)
    """Share of the documents held out, chosen by the hash of their content."""


Source = Annotated[InstalledSource | JsonlSource | HubSource, Field(discriminator="kind")]


class DomainConfig(Config):
    """One domain of a mixture."""

    weight: float = Field(gt=0, le=1)
    """Share of the training tokens; the weights of a mixture sum to 1."""
    source: Source


class TrainedTokenizer(Config):
    """A BPE trained on the mixture's own training text while it is built."""

    vocab_size: int = Field(ge=512, le=65_536, multiple_of=16)
    """Entries, end-of-text included."""


class TokenizerFile(Config):
    """A BPE kept as a ranks file beside the mixture."""

    file: Path
    """Ranks file (tiktoken's text format), relative to the mixture's own folder."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of that file."""


def _tokenizer_kind(value: Any) -> str:
    if isinstance(value, str):
        return "gpt2"
    fields = value if isinstance(value, dict) else vars(value)
    return "trained" if "vocab_size" in fields else "file"


TokenizerConfig = Annotated[
    Annotated[Literal["gpt2"], Tag("gpt2")]
    | Annotated[TokenizerFile, Tag("file")]
    | Annotated[TrainedTokenizer, Tag("trained")],
    Discriminator(_tokenizer_kind),
]


class MixtureConfig(Config):
    """Where a model's text comes from, in which shares, and how it becomes tokens."""

    name: Name
    description: str
    tokenizer: TokenizerConfig
    """'gpt2', {file, sha256} or {vocab_size}."""
    decontaminate: bool = True
    """Remove documents that share a 13-gram with an evaluation item; the build then needs the evaluation data."""
    shard_tokens: int = Field(default=100_000_000, gt=0)
    """A shard is closed after the document that brings it to so many tokens (two bytes each)."""
    domains: dict[Name, DomainConfig] = Field(min_length=1)

    @field_validator("domains")
    @classmethod
    def _weights_sum_to_one(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        total = math.fsum(domain.weight for domain in domains.values())
        if abs(total - 1) > 1e-6:
            weights = ", ".join(f"{name} {domain.weight:g}" for name, domain in domains.items())
            raise ValueError(f"weights must sum to 1 but sum to {total:g} ({weights})")
        return domains

    @property
    def weights(self) -> dict[str, float]:
        return {name: domain.weight for name, domain in self.domains.items()}

    @property
    def content_sha256(self) -> str:
        """Hash of every field that decides the built tokens: all but description, weights and file locations."""
        values = self.model_copy(
            update={
                "description": "",
                "domains": {name: domain.model_copy(update={"weight": 1.0}) for name, domain in self.domains.items()},
                "tokenizer": self.tokenizer.sha256 if isinstance(self.tokenizer, TokenizerFile) else self.tokenizer,
            }
        )
        return hashlib.sha256(values.model_dump_json(warnings=False).encode()).hexdigest()


def load_mixture(name: str | Path) -> MixtureConfig:
    """Read ``runs/mixtures/<name>.yaml``, or the YAML file at a path.

    Raises:
        UserError: there is no such mixture, or it has a mistake; the message names the field.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = MIXTURES / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in MIXTURES.glob("*.yaml"))) or "none"
            raise UserError(
                f"mixture {str(name)!r}: no such file in {MIXTURES} (there: {known}), nor a path to a .yaml"
            )
    mixture = validate(MixtureConfig, read_yaml(path), str(path))
    if isinstance(mixture.tokenizer, TokenizerFile):
        located = mixture.tokenizer.model_copy(update={"file": path.parent / mixture.tokenizer.file})
        mixture = mixture.model_copy(update={"tokenizer": located})
    return mixture
