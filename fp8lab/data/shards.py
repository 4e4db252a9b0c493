"""Token shards on disk, and the manifest that vouches for them.

A data set is a folder ``<data_dir>/<mixture>/`` of shards (unsigned 16-bit token ids, nothing else), a ranks
file ``tokenizer.tiktoken`` and ``manifest.json``. The manifest is written last and names every shard with its
tokens and SHA-256, so a folder with a manifest is complete, and `verify` tells whether it still is what was built.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from pydantic import Field, StringConstraints

from fp8lab.config import Config, Name, validate
from fp8lab.data.mixture import MixtureConfig
from fp8lab.errors import UserError
from fp8lab.records import write_atomically

TOKEN_DTYPE = np.dtype("<u2")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.tiktoken"

# A shard's name is read from a file: it must not lead out of the folder.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Shard(Config):
    """One file of token ids."""

    file: FileName
    tokens: int = Field(gt=0)
    sha256: str


class SplitManifest(Config):
    """Training or validation text of one domain."""

    documents: int = 0
    tokens: int = 0
    """End-of-text tokens included."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    shards: tuple[Shard, ...] = ()

    def __add__(self, other: SplitManifest) -> SplitManifest:
        return SplitManifest(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
            shards=self.shards + other.shards,
        )


class Removed(Config):
    """Documents that were read and not used, by reason."""

    unreadable: int = 0
    """Not UTF-8, not JSON, or without the text field."""
    empty: int = 0
    exact_duplicate: int = 0
    near_duplicate: int = 0
    contaminated: int = 0
    """Shares a 13-gram with an evaluation item."""

    def __add__(self, other: Removed) -> Removed:
        return Removed(**{field: getattr(self, field) + getattr(other, field) for field in Removed.model_fields})


class DomainManifest(Config):
    """What one domain holds and where it came from."""

    source: dict[str, Any]
    """The source's configuration and what pins it: file hashes, a revision, or installed versions."""
    removed: Removed
    train: SplitManifest
    validation: SplitManifest


class TokenizerManifest(Config):
    """The tokenizer that made the shards."""

    sha256: str
    vocab_size: int
    """Entries, end-of-text included."""


class Decontamination(Config):
    """The evaluation items that the text was checked against."""

    files: int
    items: int
    ngrams: int
    """Distinct 13-grams of words."""
    sha256: str
    """Hash of the items' files."""


class Manifest(Config):
    """``manifest.json``."""

    schema_version: Literal[1] = 1
    mixture: Name
    content_sha256: str
    """`MixtureConfig.content_sha256` of the mixture that was built."""
    tokenizer: TokenizerManifest
    decontamination: Decontamination | None
    domains: dict[Name, DomainManifest]

    @property
    def data_sha256(self) -> str:
        """Names the tokens: hash of the tokenizer's and every shard's hash, in order."""
        hashes = [self.tokenizer.sha256]
        for name, domain in self.domains.items():
            hashes += [name, *(shard.sha256 for split in (domain.train, domain.validation) for shard in split.shards)]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``manifest.json``.

    Raises:
        UserError: missing, truncated or with a wrong field.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such data set; make it with `fp8lab data build`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not JSON ({error})") from None
    return validate(Manifest, values, str(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")


def check_mixture(folder: Path, manifest: Manifest, mixture: MixtureConfig) -> None:
    """Raises UserError unless `manifest` was built from `mixture` (weights may differ)."""
    if manifest.content_sha256 != mixture.content_sha256:
        raise UserError(
            f"{folder / MANIFEST}: built from another version of mixture {mixture.name!r} or with another tokenizer; "
            "build it again with `fp8lab data build`"
        )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises UserError naming the first shard that is missing or has another size than the manifest says."""
    for shard in _all_shards(manifest):
        path = folder / shard.file
        if not path.exists():
            raise UserError(f"{path}: shard is missing; delete {folder} and build it again")
        expected = shard.tokens * TOKEN_DTYPE.itemsize
        if path.stat().st_size != expected:
            raise UserError(f"{path}: shard has {path.stat().st_size} bytes, the manifest says {expected} (truncated?)")


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare the tokenizer and every shard with the manifest; a process reads a file that has not changed once.

    Raises:
        UserError: naming the first file that is missing, truncated or changed.
    """
    check_sizes(folder, manifest)
    path = folder / TOKENIZER
    if not path.exists():
        raise UserError(f"{path}: tokenizer is missing; delete {folder} and build it again")
    if _sha256(path) != manifest.tokenizer.sha256:
        raise UserError(f"{path}: another tokenizer or a damaged one: its SHA-256 is not the manifest's")
    for shard in _all_shards(manifest):
        path = folder / shard.file
        if _sha256(path) != shard.sha256:
            raise UserError(f"{path}: shard is damaged: its SHA-256 is not the manifest's; build it again")


def _sha256(path: Path) -> str:
    facts = path.stat()
    return _sha256_once(path.resolve(), facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _sha256_once(path: Path, inode: int, size: int, modified_ns: int) -> str:
    """Hash of a file as it was when it had these attributes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_shards(manifest: Manifest) -> Iterable[Shard]:
    for domain in manifest.domains.values():
        yield from domain.train.shards
        yield from domain.validation.shards


class ShardWriter:
    """Writes one split of one part as a row of shards ``<stem>-00000.bin``, ..., each complete or absent.

    Tokens go to disk as they come, under a temporary name, so memory does not grow with the shard.
    """

    def __init__(self, folder: Path, stem: str, written: SplitManifest) -> None:
        """`written`: what an earlier, interrupted build already finished."""
        self.written = written
        self._folder = folder
        self._stem = stem
        self._reset()

    def _reset(self) -> None:
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._documents = self.tokens = self._text_bytes = 0

    def add(self, tokens: Iterable[np.ndarray], text_bytes: int) -> None:
        """Append a document (its pieces, end-of-text included) to the open shard."""
        if self._file is None:
            self._file = self._temporary.open("wb")
        for piece in tokens:
            content = piece.astype(TOKEN_DTYPE).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self.tokens += len(piece)
        self._documents += 1
        self._text_bytes += text_bytes

    def close_shard(self) -> None:
        """Give the open shard its name, if it holds anything."""
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._temporary.replace(self._folder / self._name)
        shard = Shard(file=self._name, tokens=self.tokens, sha256=self._digest.hexdigest())
        self.written += SplitManifest(
            documents=self._documents, tokens=self.tokens, text_bytes=self._text_bytes, shards=(shard,)
        )
        self._reset()

    @property
    def _name(self) -> str:
        return f"{self._stem}-{len(self.written.shards):05d}.bin"

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._name}.tmp"
