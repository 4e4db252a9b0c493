"""Documents out of JSON lines and hub data sets, one part at a time.

A *part* is what one process works through from beginning to end: a file, or a share of a streamed data set. Both
kinds are read through `datasets.load_dataset`, streaming, so memory does not grow with the corpus. A document is
a string, or None where the line could not be read; its number in the part is its place in the iteration, which
is the same every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic_core import from_json

from fp8lab.data.mixture import HubSource, JsonlSource
from fp8lab.errors import UserError

Split = Literal["train", "validation"]

MAX_LINE_BYTES = 200_000_000
PIECE_CHARACTERS = 1_000_000
"""Longer documents are worked on in pieces of at most so many characters, so that memory stays bounded."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class JsonlPart:
    """A file of JSON lines."""

    domain: str
    split: Split
    index: int
    path: Path
    text_field: str
    validation_fraction: float = 0.0
    """Share of a training part's documents that are held out."""
    scratch: Path | None = None
    """Where a compressed file is unpacked while it is read; the system's folder for temporary files if None."""

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.split}-{self.index:03d}"

    def documents(self) -> Iterator[str | None]:
        """Every line's text; None for a line that is not UTF-8, not JSON or has no text."""
        lines = count_lines(self.path)
        read = 0
        with _unpacked(self.path, self.scratch) as path:
            # As Latin-1 every byte is a character of one byte: nothing is lost, and the strings that `datasets`
            # handles stay as small as the file. In UTF-8 one emoji makes each copy of a line four times as large.
            for row in _load_dataset(
                "text", data_files=_literal(path), split="train", streaming=True, encoding="latin-1"
            ):
                read += 1
                line = row.pop("text").encode("latin-1").strip()
                if line:
                    text = _text_of(line, self.text_field)
                    del line  # not to be held while the text is worked on
                    yield text
        if read != lines:
            raise UserError(
                f"{self.path}: {lines} lines, of which `datasets` read {read}: a carriage return in a line?"
            )


@dataclass(frozen=True)
class HubPart:
    """One of `count` shares of a streamed data set."""

    domain: str
    split: Split
    index: int
    source: HubSource

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.split}-{self.index:03d}"

    @property
    def validation_fraction(self) -> float:
        return self.source.validation_fraction

    @property
    def max_tokens(self) -> int:
        """This part's share of the domain's training tokens."""
        return -(-self.source.max_tokens // self.source.parts)

    def documents(self) -> Iterator[str | None]:
        """The text of every row of this share that `where` admits; None where it is missing."""
        source = self.source
        dataset = _load_dataset(
            source.dataset,
            source.subset,
            data_files=list(source.data_files) or None,
            # A revision is of the hub; a folder has none.
            revision=None if Path(source.dataset).is_dir() else source.revision,
            split=source.split,
            streaming=True,
        )
        if source.parts > dataset.num_shards:
            raise UserError(
                f"domain {self.domain!r}: parts: {source.parts} is more than the {dataset.num_shards} files of "
                f"{source.dataset}"
            )
        for row in dataset.shard(num_shards=source.parts, index=self.index):
            if source.text_field not in row:
                raise UserError(
                    f"domain {self.domain!r}: text_field: {source.dataset} has no column {source.text_field!r}; "
                    f"it has {', '.join(row)}"
                )
            if all(_value_at(row, path) == value for path, value in source.where.items()):
                yield _string(row[source.text_field])


def _value_at(row: Any, path: str) -> Any:
    """The value of a column, or of a nested one: 'metadata.language'."""
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


Part = JsonlPart | HubPart


def jsonl_parts(domain: str, source: JsonlSource, corpus_dir: Path, scratch: Path | None = None) -> list[JsonlPart]:
    """A part for every file of the source.

    Raises:
        UserError: a pattern matches no file, or leads out of the corpus folder.
    """
    held_out = 0.0 if source.validation else source.validation_fraction
    parts = []
    for split, patterns in (("train", source.train), ("validation", source.validation)):
        files: list[Path] = []
        for pattern in patterns:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise UserError(f"domain {domain!r}: {split} {pattern!r} must stay inside the corpus folder")
            matched = sorted(corpus_dir.glob(pattern))
            if not matched:
                raise UserError(f"domain {domain!r}: {split} {pattern!r} matches no file in {corpus_dir}")
            files += matched
        # A file held out is not trained on, also where a training pattern matches it.
        files = [file for file in files if split == "validation" or not _matches(file, source.validation, corpus_dir)]
        parts += [
            JsonlPart(
                domain,
                split,  # type: ignore[arg-type]
                index,
                file,
                source.text_field,
                held_out if split == "train" else 0.0,
                scratch,
            )
            for index, file in enumerate(dict.fromkeys(files))
        ]
    return parts


def _matches(file: Path, patterns: tuple[str, ...], folder: Path) -> bool:
    return any(file in set(folder.glob(pattern)) for pattern in patterns)


def open_text(path: Path) -> BinaryIO:
    """The decompressed bytes of a ``.jsonl`` or ``.jsonl.zst`` file."""
    if path.suffix == ".zst":
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(stream, _BLOCK)
    return path.open("rb")


@contextlib.contextmanager
def _unpacked(path: Path, scratch: Path | None) -> Iterator[Path]:
    """The file decompressed: of a compressed one, `datasets` would read the text in the encoding of the locale."""
    if path.suffix != ".zst":
        yield path
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        plain = Path(folder) / path.stem
        with open_text(path) as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, _BLOCK)
        yield plain


def count_lines(path: Path) -> int:
    """The number of lines, without holding more than one.

    Raises:
        UserError: a line is longer than 200 MB; the message gives its number (from 1).
    """
    with open_text(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{path}: line {number} is longer than {MAX_LINE_BYTES // 1_000_000} MB")
    return number


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `PIECE_CHARACTERS`, cut after a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as it lies."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_of(line: bytes, field: str) -> str | None:
    try:
        row = from_json(line)
    except ValueError:
        return None
    return _string(row.get(field)) if isinstance(row, dict) else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _literal(path: Path) -> str:
    """`path` as a data_files pattern that matches itself alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in str(path.resolve()))


def _load_dataset(*arguments: Any, **keywords: Any) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    # Else each local file read calls the hub first, and without network waits for it: seconds a file.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets.load_dataset(*arguments, **keywords)
