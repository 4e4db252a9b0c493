"""`build`: from a mixture to verified shards, in parallel, resumable.

Stages, each over all parts (a file, or a share of a streamed data set) side by side:

1. gather: text of installed packages becomes JSON lines; other sources already have files or a stream.
2. fingerprint: content hash, MinHash and contamination of every local document.
3. exclusions: per domain, validation first (`fp8lab.data.cleaning.find_exclusions`).
4. tokenise: each part becomes shards. A streamed document is checked for contamination here, being read only once.
5. manifest: written last.

The work folder ``.build`` keeps each stage's results and, for every part, how many documents its finished shards
hold. A build that was stopped goes on from there; one whose inputs have changed starts over.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from rich.console import Console

from fp8lab import records, tokenizer
from fp8lab.data import cleaning, installed
from fp8lab.data.mixture import HubSource, InstalledSource, JsonlSource, MixtureConfig, TokenizerFile, TrainedTokenizer
from fp8lab.data.shards import (
    MANIFEST,
    TOKENIZER,
    Decontamination,
    DomainManifest,
    Manifest,
    Removed,
    SplitManifest,
    TokenizerManifest,
    check_sizes,
    read_manifest,
    write_manifest,
)
from fp8lab.data.sources import HubPart, JsonlPart, Part, Split, file_sha256, jsonl_parts
from fp8lab.data.tokenise import PartResult, TokeniseJob, load_items, ngram_file, tokenise_part
from fp8lab.data.workers import WorkerPool, counted
from fp8lab.errors import UserError
from fp8lab.provenance import collect_provenance, cpu_name, utc_now

MAX_UNREADABLE = 0.001
"""Share of a domain's documents that may be unreadable before the build is refused."""


def build(
    mixture: MixtureConfig,
    data_dir: Path,
    *,
    corpus_dir: Path | None = None,
    eval_data_dir: Path | None = None,
    processes: int | None = None,
    records_dir: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Build ``<data_dir>/<mixture.name>``, go on with a build that was stopped, or return at once if it is complete.

    Where another process is building it, wait for that one.

    Args:
        corpus_dir: folder that the patterns of jsonl sources start from.
        eval_data_dir: folder of evaluation items (``*.jsonl``), for decontamination.
        processes: worker processes; all cores if None.
        records_dir: where to write the build's `DataRecord` (plan 'data', run: the mixture's name), if anywhere.

    Raises:
        UserError: an input is missing or bad, `data_dir` or the data set's folder is a file or cannot be written to,
            or a shard of a finished build is missing or truncated.
    """
    folder = Path(data_dir) / mixture.name
    console = console or Console(stderr=True)
    if _is_complete(folder, mixture):
        return folder
    inputs = _inputs(mixture, corpus_dir, eval_data_dir)
    with _only_builder(folder, console):
        # The one waited for may have completed it.
        if not _is_complete(folder, mixture):
            work = _open_work_folder(folder, inputs)
            _build(mixture, folder, work, corpus_dir, eval_data_dir, processes, records_dir, console)
    return folder


def _is_complete(folder: Path, mixture: MixtureConfig) -> bool:
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    if manifest.content_sha256 != mixture.content_sha256:
        return False
    check_sizes(folder, manifest)
    return True


@contextlib.contextmanager
def _only_builder(folder: Path, console: Console) -> Iterator[None]:
    """Hold the lock of a data set, beside its folder, which a build may empty; a dead owner's is gone with it."""
    records.make_writable(folder.parent)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"{folder}: another process is building it; waiting for it", markup=False, soft_wrap=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    mixture: MixtureConfig,
    folder: Path,
    work: Path,
    corpus_dir: Path | None,
    eval_data_dir: Path | None,
    processes: int | None,
    records_dir: Path | None,
    console: Console,
) -> None:
    """`build`, by its only builder."""
    started = time.monotonic()
    provenance = collect_provenance(cpu_name())
    with WorkerPool(processes or os.cpu_count() or 1, console) as pool:
        items = None if eval_data_dir is None or not mixture.decontaminate else _evaluation_items(eval_data_dir, work)
        parts = _gather(mixture, corpus_dir, work, pool)
        exclusions = _find_exclusions(parts, work, items is not None, pool)
        encoding = _tokenizer(mixture, parts, exclusions)
        records.write_atomically(folder / TOKENIZER, tokenizer.ranks_text(encoding))
        jobs = [
            TokeniseJob(part, folder, mixture.shard_tokens, exclusions[part.name], items is not None)
            for part in itertools.chain.from_iterable(parts.values())
        ]
        results = pool.map("tokenise", tokenise_part, jobs)
        by_part = {job.part.name: result for job, result in zip(jobs, results, strict=True)}
        manifest = _manifest(mixture, encoding, items, parts, by_part)
    write_manifest(folder, manifest)
    shutil.rmtree(work)
    if records_dir is not None:
        _write_record(manifest, mixture, provenance, time.monotonic() - started, records_dir)


def train_tokenizer(
    mixture: MixtureConfig,
    vocab_size: int,
    out: Path,
    *,
    corpus_dir: Path | None = None,
    sample_bytes: int = 200_000_000,
) -> tiktoken.Encoding:
    """Train a BPE on a sample of the mixture's training text, domains by weight, and write its ranks file to `out`.

    Args:
        vocab_size: entries, end-of-text included; a multiple of 16.
        corpus_dir: folder that the patterns of jsonl sources start from.
        sample_bytes: characters of text to learn from, at most.

    Raises:
        UserError: `vocab_size` is no multiple of 16, an input is missing or bad, `out` is a folder or cannot be
            written, or the text is too small for the vocabulary.
    """
    if vocab_size % 16:
        raise UserError(f"vocabulary size: {vocab_size} is no multiple of 16, which an FP8 output head needs")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write")
    _check_corpus(mixture, corpus_dir)
    records.make_writable(out.parent)
    work = out.parent / f".{out.name}.build"
    work.mkdir(exist_ok=True)
    try:
        with WorkerPool(1, None) as pool:
            parts = _gather(mixture, corpus_dir, work, pool)
        encoding = tokenizer.train(sample_texts(mixture, parts, sample_bytes), vocab_size, out.stem)
        records.write_atomically(out, tokenizer.ranks_text(encoding))
    finally:
        shutil.rmtree(work)
    return encoding


def _check_corpus(mixture: MixtureConfig, corpus_dir: Path | None) -> None:
    for name, domain in mixture.domains.items():
        if isinstance(domain.source, JsonlSource) and (corpus_dir is None or not corpus_dir.is_dir()):
            given = "none was given" if corpus_dir is None else f"{corpus_dir} is no folder"
            raise UserError(
                f"domain {name!r} of mixture {mixture.name!r} is read from local files: give the corpus folder "
                f"(--corpus DIR); {given}"
            )


def _inputs(mixture: MixtureConfig, corpus_dir: Path | None, eval_data_dir: Path | None) -> str:
    """Tells one set of inputs from another, or from a changed one.

    Raises:
        UserError: an input is missing.
    """
    if mixture.decontaminate and eval_data_dir is None:
        raise UserError(
            f"mixture {mixture.name!r} removes evaluation text from training: give the evaluation data "
            "(--eval-data DIR), or set its field decontaminate to false"
        )
    _check_corpus(mixture, corpus_dir)
    states: list[tuple[str, int, int]] = []
    for name, domain in mixture.domains.items():
        if isinstance(domain.source, JsonlSource):
            assert corpus_dir is not None
            states += [_state_of(part.path) for part in jsonl_parts(name, domain.source, corpus_dir)]
        elif isinstance(domain.source, InstalledSource):
            states.append((installed.revision(domain.source), 0, 0))
    if eval_data_dir is not None:
        states += [_state_of(path) for path in sorted(eval_data_dir.rglob("*.jsonl"))]
    return json.dumps([mixture.content_sha256, states])


def _open_work_folder(folder: Path, inputs: str) -> Path:
    """The folder of half-done work: kept if it is of the same inputs, else emptied with all old shards."""
    state_file = folder / ".build" / "state.json"
    if not state_file.exists() or state_file.read_text() != inputs:
        shutil.rmtree(folder, ignore_errors=True)
        records.make_writable(folder)
        records.write_atomically(state_file, inputs.encode())
    (folder / MANIFEST).unlink(missing_ok=True)
    return state_file.parent


def _state_of(path: Path) -> tuple[str, int, int]:
    """Tells a file from a changed one without reading it."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _evaluation_items(folder: Path, work: Path) -> Decontamination:
    """Collect the evaluation items' 13-grams into a file that the workers map."""
    items = cleaning.EvaluationItems.read(folder)
    np.save(ngram_file(work), items.ngrams, allow_pickle=False)
    return items.report


def _gather(mixture: MixtureConfig, corpus_dir: Path | None, work: Path, pool: WorkerPool) -> dict[str, list[Part]]:
    """The parts of every domain, validation parts first."""
    from_packages = [(n, d.source, work) for n, d in mixture.domains.items() if isinstance(d.source, InstalledSource)]
    gathered = dict(
        zip((n for n, *_ in from_packages), pool.map("gather", _gather_installed, from_packages), strict=True)
    )
    parts: dict[str, list[Part]] = {}
    for name, domain in mixture.domains.items():
        source = domain.source
        if isinstance(source, InstalledSource):
            parts[name] = list(gathered[name])
        elif isinstance(source, JsonlSource):
            assert corpus_dir is not None
            found = jsonl_parts(name, source, corpus_dir, scratch=work)
            parts[name] = sorted(found, key=lambda part: part.split != "validation")
        else:
            parts[name] = [HubPart(name, "train", index, source) for index in range(source.parts)]
    return parts


def _gather_installed(task: tuple[str, InstalledSource, Path]) -> list[JsonlPart]:
    name, source, work = task
    train, validation = installed.documents(source)
    parts: list[JsonlPart] = []
    splits: tuple[tuple[Split, list[str]], ...] = (("validation", validation), ("train", train))
    for split, texts in splits:
        path = work / f"{name}-{split}.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        records.write_atomically(path, lines.encode())
        parts.append(JsonlPart(name, split, 0, path, "text"))
    return parts


def _find_exclusions(
    parts: dict[str, list[Part]], work: Path, decontaminate: bool, pool: WorkerPool
) -> dict[str, cleaning.Exclusions]:
    """By part. Hub data sets come deduplicated and are too large to compare: none of theirs are named here."""
    local = {name: [p for p in of_domain if isinstance(p, JsonlPart)] for name, of_domain in parts.items()}
    prints = [(part, work, decontaminate) for part in itertools.chain.from_iterable(local.values())]
    pool.map("fingerprint", _fingerprint, prints)
    tasks = [(of_domain, work) for of_domain in local.values() if of_domain]
    found = {part.name: cleaning.Exclusions() for part in itertools.chain.from_iterable(parts.values())}
    for (of_domain, _), exclusions in zip(tasks, pool.map("exclusions", _exclusions_of_domain, tasks), strict=True):
        found |= {part.name: exclusion for part, exclusion in zip(of_domain, exclusions, strict=True)}
    return found


def _fingerprint(task: tuple[JsonlPart, Path, bool]) -> None:
    part, work, decontaminate = task
    path = work / f"{part.name}.npz"
    if path.exists():
        return
    prints = cleaning.fingerprints(counted(part.documents()), load_items(work) if decontaminate else None)
    temporary = path.with_suffix(".tmp.npz")
    columns: dict[str, Any] = {field.name: getattr(prints, field.name) for field in fields(prints)}
    np.savez(temporary, **columns)
    temporary.replace(path)


def _exclusions_of_domain(task: tuple[list[JsonlPart], Path]) -> list[cleaning.Exclusions]:
    parts, work = task
    prints = []
    for part in parts:
        with np.load(work / f"{part.name}.npz", allow_pickle=False) as arrays:
            prints.append(cleaning.Fingerprints(**{name: arrays[name] for name in arrays.files}))
    _refuse_unreadable(parts[0].domain, sum(int(p.unreadable) for p in prints), sum(int(p.documents) for p in prints))
    return cleaning.find_exclusions(prints)


def _refuse_unreadable(domain: str, unreadable: int, documents: int) -> None:
    if unreadable > MAX_UNREADABLE * documents:
        raise UserError(
            f"domain {domain!r}: {unreadable} of {documents} documents are unreadable (not UTF-8, not JSON, or without "
            f"the text field); more than {MAX_UNREADABLE:.1%} is refused"
        )


def _tokenizer(
    mixture: MixtureConfig, parts: dict[str, list[Part]], exclusions: dict[str, cleaning.Exclusions]
) -> tiktoken.Encoding:
    if isinstance(mixture.tokenizer, TokenizerFile):
        return tokenizer.load(mixture.tokenizer.file, mixture.tokenizer.sha256)
    if isinstance(mixture.tokenizer, TrainedTokenizer):
        texts = _training_texts(itertools.chain.from_iterable(parts.values()), exclusions)
        return tokenizer.train(texts, mixture.tokenizer.vocab_size, mixture.name)
    return tokenizer.gpt2()


def _training_texts(parts: Iterable[Part], exclusions: dict[str, cleaning.Exclusions]) -> Iterator[str]:
    for part in parts:
        if part.split == "train":
            excluded = exclusions.get(part.name, cleaning.Exclusions())
            for number, text in enumerate(part.documents()):
                held_out = text is None or cleaning.in_validation(text, part.validation_fraction)
                if text and not held_out and excluded.reason(number) is None:
                    yield text


def sample_texts(mixture: MixtureConfig, parts: dict[str, list[Part]], sample_bytes: int) -> Iterator[str]:
    """Training texts up to each domain's share of `sample_bytes`, its parts in turn."""
    for name, weight in mixture.weights.items():
        of_domain = [part for part in parts[name] if part.split == "train"]
        left = weight * sample_bytes
        streams = [_training_texts([part], {}) for part in of_domain]
        while streams and left > 0:
            for stream in list(streams):
                text = next(stream, None)
                if text is None:
                    streams.remove(stream)
                elif left > 0:
                    left -= len(text)
                    yield text


def _manifest(
    mixture: MixtureConfig,
    encoding: tiktoken.Encoding,
    items: Decontamination | None,
    parts: dict[str, list[Part]],
    results: dict[str, PartResult],
) -> Manifest:
    domains = {}
    for name, domain in mixture.domains.items():
        removed, train, validation = Removed(), SplitManifest(), SplitManifest()
        documents = 0
        for part in parts[name]:
            result = results[part.name]
            removed += result.removed
            train += result.train
            validation += result.validation
            documents += result.documents_read
        _refuse_unreadable(name, removed.unreadable, documents)
        for split, content in (("training", train), ("validation", validation)):
            if not content.documents:
                raise UserError(f"domain {name!r} of mixture {mixture.name!r} has no {split} text")
        source = domain.source.model_dump(mode="json") | _pins(domain.source, parts[name])
        domains[name] = DomainManifest(source=source, removed=removed, train=train, validation=validation)
    return Manifest(
        mixture=mixture.name,
        content_sha256=mixture.content_sha256,
        tokenizer=TokenizerManifest(sha256=tokenizer.sha256(encoding), vocab_size=encoding.n_vocab),
        decontamination=items,
        domains=domains,
    )


def _pins(source: InstalledSource | JsonlSource | HubSource, parts: Sequence[Part]) -> dict[str, Any]:
    """What a source's text was, exactly."""
    if isinstance(source, InstalledSource):
        return {"versions": installed.revision(source)}
    if isinstance(source, JsonlSource):
        return {"files": {part.path.name: file_sha256(part.path) for part in parts if isinstance(part, JsonlPart)}}
    return {}


def _write_record(
    manifest: Manifest, mixture: MixtureConfig, provenance: records.Provenance, seconds: float, records_dir: Path
) -> None:
    domains = manifest.model_dump(mode="json")["domains"]
    for domain in domains.values():
        for split in ("train", "validation"):
            domain[split]["shards"] = len(domain[split]["shards"])
    provenance.ended_utc = utc_now()
    provenance.data_sha256 = manifest.data_sha256
    provenance.tokenizer_sha256 = manifest.tokenizer.sha256
    decontamination = manifest.decontamination
    record = records.DataRecord(
        plan="data",
        run=mixture.name,
        status="finished",
        provenance=provenance,
        results={
            "domains": domains,
            "decontamination": None if decontamination is None else decontamination.model_dump(),
            "seconds": round(seconds, 1),
            "peak_memory_bytes": _peak_memory_bytes(),
        },
        config=mixture.model_dump(mode="json"),
    )
    records.write(record, records_dir)


def _peak_memory_bytes() -> int:
    """The most resident memory that this process, or any that it started and that has ended, ever had."""
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return largest if sys.platform == "darwin" else largest * 1024
