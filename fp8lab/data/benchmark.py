"""How fast the data path is, measured against what it must keep up with.

    python -m fp8lab.data.benchmark tokenise --corpus CORPUS
    python -m fp8lab.data.benchmark loader --data-dir DATA
    python -m fp8lab.data.benchmark memory

Each writes a benchmark record (`fp8lab.measurement`), ``runs/records/benchmarks/data-<what>/``.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fp8lab import records, tokenizer
from fp8lab.data import cleaning
from fp8lab.data.build import build, sample_texts
from fp8lab.data.loader import Loader, TokenDataset
from fp8lab.data.mixture import DomainConfig, JsonlSource, MixtureConfig, TokenizerFile, load_mixture
from fp8lab.data.shards import TOKENIZER
from fp8lab.data.sources import JsonlPart, Part, jsonl_parts
from fp8lab.data.tokenise import TokeniseJob, tokenise_part
from fp8lab.data.workers import WorkerPool
from fp8lab.errors import UserError
from fp8lab.measurement import begin_provenance, console, print_summary, run_app, summary, write_benchmark
from fp8lab.provenance import cpu_name

_DOCUMENTS_A_CALL = 1000

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Mixture = Annotated[str, typer.Option(help="A name in runs/mixtures, or a YAML file.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds, after one that is not counted.")]
RecordsDir = Annotated[Path, typer.Option(help="Folder of run records.")]


def time_tokenising(
    mixture: MixtureConfig, corpus_dir: Path, *, sample_bytes: int, rounds: int, processes: int
) -> dict[str, Any]:
    """The build's tokenise stage and tiktoken's own batch encoding in turns, on the same text and cores.

    The stage reads JSON lines, checks them, encodes, and writes hashed shards, in `processes` processes. tiktoken gets
    the text from memory, 1,000 documents a call, and `processes` threads.

    Returns:
        both speeds in megabytes of UTF-8 text per second, and their ratio round by round (ours / tiktoken's).

    Raises:
        UserError: the mixture has no tokenizer file, or its domains are not local JSON lines.
    """
    file = _tokenizer_file(mixture)
    encoding = tokenizer.load(file.file, file.sha256)
    texts = list(sample_texts(mixture, _parts_of(mixture, corpus_dir), sample_bytes))
    size = sum(len(text.encode()) for text in texts)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch, WorkerPool(processes, Console(quiet=True)) as pool:
        parts = list(_write_parts(texts, 4 * processes, Path(scratch)))
        for number in range(rounds + 1):
            folder = Path(scratch) / f"round-{number}"
            (folder / ".build").mkdir(parents=True)
            (folder / TOKENIZER).write_bytes(tokenizer.ranks_text(encoding))
            jobs = [TokeniseJob(part, folder, mixture.shard_tokens, cleaning.Exclusions(), False) for part in parts]
            started = time.perf_counter()
            results = pool.map("tokenise", tokenise_part, jobs)
            ended = time.perf_counter()
            ours.append(size / 1e6 / (ended - started))

            started = time.perf_counter()
            tokens = 0
            for first in range(0, len(texts), _DOCUMENTS_A_CALL):
                batch = texts[first : first + _DOCUMENTS_A_CALL]
                tokens += sum(map(len, encoding.encode_ordinary_batch(batch, num_threads=processes)))
            ended = time.perf_counter()
            theirs.append(size / 1e6 / (ended - started))
            if sum(result.train.tokens for result in results) != tokens + len(texts):
                raise RuntimeError("the two did not make the same number of tokens")
    # The first round starts the worker processes and fills the page cache.
    return {
        "documents": len(texts),
        "text_bytes": size,
        "tokens": tokens,
        "processes": processes,
        "build_megabytes_per_second": summary(ours[1:]),
        "tiktoken_megabytes_per_second": summary(theirs[1:]),
        "ratio": summary([own / other for own, other in zip(ours[1:], theirs[1:], strict=True)]),
    }


def _parts_of(mixture: MixtureConfig, corpus_dir: Path) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for name, domain in mixture.domains.items():
        if not isinstance(domain.source, JsonlSource):
            raise UserError(
                f"mixture {mixture.name!r}: domain {name!r} is not local JSON lines: choose another mixture"
            )
        parts[name] = list(jsonl_parts(name, domain.source, corpus_dir))
    return parts


def _write_parts(texts: Sequence[str], count: int, folder: Path) -> Iterator[JsonlPart]:
    for index in range(count):
        path = folder / f"{index:03d}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[index::count]), encoding="utf-8")
        yield JsonlPart("sample", "train", index, path, "text")


def time_loader(dataset: TokenDataset, *, seq_len: int, batch_tokens: int, steps: int, rounds: int) -> dict[str, Any]:
    """Draw `steps` consecutive batches a round from the page cache, which opening the data set has filled.

    Returns:
        training tokens (targets) per second.
    """
    loader = Loader(dataset, seq_len=seq_len, seed=1, global_batch_sequences=batch_tokens // seq_len)
    speeds = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            loader.batch(step)
        speeds.append(steps * batch_tokens / (time.perf_counter() - started))
    return {
        "seq_len": seq_len,
        "batch_tokens": batch_tokens,
        "steps": steps,
        "tokens_per_second": summary(speeds[1:]),
    }


def measure_memory(mixture: MixtureConfig, *, document_bytes: int, processes: int) -> dict[str, Any]:
    """Build two documents of `document_bytes` with the mixture's tokenizer, and read the record's peak memory.

    One document is ASCII. The other has an emoji besides, so that Python needs four bytes for each of its characters.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_document(folder / "corpus/ascii.jsonl", _random_lines(document_bytes))
        _write_document(
            folder / "corpus/emoji.jsonl", itertools.chain(["\N{GRINNING FACE}"], _random_lines(document_bytes))
        )
        _write_document(folder / "corpus/validation.jsonl", _random_lines(1000, seed="validation"))
        _write_document(folder / "items/items.jsonl", _random_lines(1000, seed="items"))
        long = MixtureConfig(
            name="memory",
            description="Two long documents",
            tokenizer=_tokenizer_file(mixture),
            domains={
                "long": DomainConfig(
                    weight=1,
                    source=JsonlSource(
                        kind="jsonl",
                        train=("ascii.jsonl", "emoji.jsonl"),
                        validation=("validation.jsonl",),
                        licence="none: random words",
                    ),
                )
            },
        )
        build(
            long,
            folder / "data",
            corpus_dir=folder / "corpus",
            eval_data_dir=folder / "items",
            processes=processes,
            records_dir=folder / "records",
            console=Console(quiet=True),
        )
        built = records.read(records.record_dir(folder / "records", "data", long.name))
    assert isinstance(built, records.DataRecord)
    return {
        "document_bytes": document_bytes,
        "processes": processes,
        "tokens": built.results["domains"]["long"]["train"]["tokens"],
        "seconds": built.results["seconds"],
        "peak_memory_bytes": built.results["peak_memory_bytes"],
    }


def _tokenizer_file(mixture: MixtureConfig) -> TokenizerFile:
    if not isinstance(mixture.tokenizer, TokenizerFile):
        raise UserError(f"mixture {mixture.name!r}: its tokenizer is not a file: choose another mixture")
    return mixture.tokenizer


def _random_lines(size: int, seed: str = "") -> Iterator[str]:
    """Lines of twelve random words, together of at least `size` characters."""
    rng = random.Random(seed)
    while size > 0:
        line = " ".join(f"{rng.getrandbits(24):x}" for _ in range(12)) + "\n"
        size -= len(line)
        yield line


def _write_document(path: Path, lines: Iterable[str]) -> None:
    """A file of one JSON line, not escaped to ASCII."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"text": "".join(lines)}, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command("tokenise")
def tokenise_command(
    corpus: Annotated[Path, typer.Option(help="Folder of the mixture's JSON lines.")],
    mixture: Mixture = "local",
    sample_bytes: Annotated[int, typer.Option(min=1, help="Text to tokenise, by the mixture's weights.")] = 100_000_000,
    rounds: Rounds = 9,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes, and tiktoken's threads; all cores.")] = None,
    records_dir: RecordsDir = Path("runs/records"),
) -> None:
    """Time the build's tokenising beside tiktoken's own batch encoding (MB/s)."""
    provenance = _provenance()
    results = time_tokenising(
        load_mixture(mixture),
        corpus,
        sample_bytes=sample_bytes,
        rounds=rounds,
        processes=processes or os.cpu_count() or 1,
    )
    provenance.tokenizer_sha256 = _tokenizer_file(load_mixture(mixture)).sha256
    write_benchmark("data-tokenise", results, provenance, records_dir)
    for what in ("build_megabytes_per_second", "tiktoken_megabytes_per_second", "ratio"):
        print_summary(what, results[what])


@app.command("loader")
def loader_command(
    data_dir: Annotated[Path, typer.Option(help="Folder of token shards.")] = Path("data"),
    mixture: Mixture = "local",
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a global batch.")] = 131_072,
    steps: Annotated[int, typer.Option(min=1, help="Batches a round.")] = 100,
    rounds: Rounds = 9,
    records_dir: RecordsDir = Path("runs/records"),
) -> None:
    """Time the loader on shards in the page cache (tokens/s)."""
    provenance = _provenance()
    dataset = TokenDataset.open(load_mixture(mixture), data_dir)
    results = time_loader(dataset, seq_len=seq_len, batch_tokens=batch_tokens, steps=steps, rounds=rounds)
    provenance.data_sha256, provenance.tokenizer_sha256 = dataset.sha256, dataset.tokenizer_sha256
    write_benchmark("data-loader", results, provenance, records_dir)
    print_summary("tokens_per_second", results["tokens_per_second"])


@app.command("memory")
def memory_command(
    mixture: Mixture = "local",
    document_bytes: Annotated[int, typer.Option(min=1, help="Size of each of two documents.")] = 100_000_000,
    processes: Annotated[int | None, typer.Option(min=1, help="Worker processes; all cores if left out.")] = None,
    records_dir: RecordsDir = Path("runs/records"),
) -> None:
    """Measure the peak memory of a process that builds one huge document."""
    provenance = _provenance()
    results = measure_memory(
        load_mixture(mixture), document_bytes=document_bytes, processes=processes or os.cpu_count() or 1
    )
    write_benchmark("data-memory", results, provenance, records_dir)
    console.print(f"peak memory of a process: {results['peak_memory_bytes'] / 2**30:.2f} GiB")


def _provenance() -> records.Provenance:
    return begin_provenance("fp8lab.data.benchmark", cpu_name())


if __name__ == "__main__":
    run_app(app)
