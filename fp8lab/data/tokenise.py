"""One part of a source into token shards: resumable, in bounded memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from fp8lab import records, tokenizer
from fp8lab.config import Config
from fp8lab.data import cleaning
from fp8lab.data.shards import TOKENIZER, Decontamination, Removed, ShardWriter, SplitManifest
from fp8lab.data.sources import HubPart, Part, pieces
from fp8lab.data.workers import counted


class PartResult(Config):
    """What a part's finished shards hold; kept beside them so that a stopped build can go on."""

    documents_read: int = 0
    finished: bool = False
    removed: Removed = Removed()
    train: SplitManifest = SplitManifest()
    validation: SplitManifest = SplitManifest()


@dataclass(frozen=True)
class TokeniseJob:
    """Tokenise one part into `folder`."""

    part: Part
    folder: Path
    shard_tokens: int
    excluded: cleaning.Exclusions
    decontaminate: bool


def tokenise_part(job: TokeniseJob) -> PartResult:
    """Read a part, and write its documents as shards, from where an earlier, stopped build got to."""
    part, folder = job.part, job.folder
    sidecar = folder / ".build" / f"{part.name}.json"
    result = PartResult.model_validate_json(sidecar.read_bytes()) if sidecar.exists() else PartResult()
    if result.finished:
        return result
    encoding = tokenizer.load(folder / TOKENIZER)
    items = load_items(folder / ".build") if job.decontaminate and isinstance(part, HubPart) else None
    train = ShardWriter(folder, f"{part.domain}-train-{part.index:03d}", result.train)
    validation = ShardWriter(folder, f"{part.domain}-validation-{part.index:03d}", result.validation)
    removed = result.removed.model_dump()
    max_tokens = part.max_tokens if isinstance(part, HubPart) else None

    def save(documents_read: int, finished: bool) -> PartResult:
        train.close_shard()
        validation.close_shard()
        saved = PartResult(
            documents_read=documents_read,
            finished=finished,
            removed=Removed(**removed),
            train=train.written,
            validation=validation.written,
        )
        records.write_atomically(sidecar, saved.model_dump_json().encode())
        return saved

    documents_read = result.documents_read
    numbered = enumerate(counted(part.documents()))
    for number, text in itertools.islice(numbered, documents_read, None):
        documents_read = number + 1
        reason = _why_removed(number, text, job.excluded, items)
        if reason is not None or text is None:
            removed[reason or "unreadable"] += 1
            continue
        held_out = part.split == "validation" or cleaning.in_validation(text, part.validation_fraction)
        writer = validation if held_out else train
        writer.add(encode_document(encoding, text), sum(len(piece.encode()) for piece in pieces(text)))
        if max_tokens is not None and train.written.tokens + train.tokens >= max_tokens:
            break
        if writer.tokens >= job.shard_tokens:
            save(documents_read, finished=False)
    return save(documents_read, finished=True)


def _why_removed(
    number: int, text: str | None, excluded: cleaning.Exclusions, items: cleaning.EvaluationItems | None
) -> str | None:
    """The field of `Removed` to count a document under, or None to keep it."""
    if text is None:
        return "unreadable"
    if not text or text.isspace():
        return "empty"
    if items is not None and items.contaminate(text):
        return "contaminated"
    return excluded.reason(number)


def encode_document(encoding: tiktoken.Encoding, text: str) -> Iterator[np.ndarray]:
    """Token ids of a document, a piece at a time, end-of-text last: uint32 arrays.

    Text that spells a special token stays text: nothing in a document becomes the end-of-text token.
    """
    for piece in pieces(text):
        yield encoding.encode_to_numpy(piece, allowed_special=set(), disallowed_special=())
    yield np.array([encoding.eot_token], dtype=np.uint32)


def ngram_file(work: Path) -> Path:
    return work / "evaluation-ngrams.npy"


def load_items(work: Path) -> cleaning.EvaluationItems:
    """The evaluation items, read once a process."""
    file = ngram_file(work)
    return _read_items(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read_items(file: Path, _modified: int) -> cleaning.EvaluationItems:
    ngrams = np.load(file, mmap_mode="r", allow_pickle=False)
    return cleaning.EvaluationItems(ngrams, Decontamination(files=0, items=0, ngrams=len(ngrams), sha256=""))
