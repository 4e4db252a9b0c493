from __future__ import annotations

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fp8lab import records
from fp8lab.data import MixtureConfig, TokenDataset, build, sources, train_tokenizer
from fp8lab.data.shards import ShardWriter, read_manifest
from fp8lab.data.tokenise import encode_document
from fp8lab.data.workers import WorkerPool
from fp8lab.errors import UserError
from tests.conftest import ROOT
from tests.data.conftest import sentence, write_jsonl

PATIENCE_SECONDS = 240


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def documents(dataset: TokenDataset, domain: str, split: str = "train") -> list[str]:
    """The documents that a split's shards hold."""
    texts = []
    for shard in getattr(dataset.manifest.domains[domain], split).shards:
        tokens = np.fromfile(dataset.folder / shard.file, dtype="<u2")
        assert tokens[-1] == dataset.encoding.eot_token
        ends = np.flatnonzero(tokens == dataset.encoding.eot_token)
        texts += [dataset.encoding.decode(document.tolist()) for document in np.split(tokens, ends + 1)[:-1]]
    return [text.removesuffix("<|endoftext|>") for text in texts]


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_every_document_comes_back_from_the_shards(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    mixture = mixture_of()
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    expected = read_texts(corpus / "prose/00.jsonl") + read_texts(corpus / "prose/01.jsonl")
    assert documents(dataset, "prose") == expected
    assert documents(dataset, "prose", "validation") == read_texts(corpus / "prose/val.jsonl")
    counts = dataset.manifest.domains["prose"].train
    assert (counts.documents, counts.text_bytes) == (80, sum(len(text.encode()) for text in expected))


def test_a_complete_build_is_left_alone(
    mixture_of: Callable, corpus: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = mixture_of()
    folder = build(mixture, data_dir, corpus_dir=corpus, processes=1)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    # Not even the corpus is needed any more.
    assert build(mixture, data_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_changed_mixture_is_built_anew(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    build(mixture_of(), data_dir, corpus_dir=corpus, processes=1)
    changed = mixture_of(tokenizer={"vocab_size": 528})
    build(changed, data_dir, corpus_dir=corpus, processes=1)
    assert TokenDataset.open(changed, data_dir).encoding.n_vocab == 528


def test_two_processes_build_what_one_builds(mixture_of: Callable, corpus: Path, tmp_path: Path) -> None:
    manifests = [
        read_manifest(build(mixture_of(), tmp_path / str(processes), corpus_dir=corpus, processes=processes))
        for processes in (1, 2)
    ]
    assert manifests[0] == manifests[1]


def test_a_second_build_of_the_same_data_waits_for_the_first(
    mixture_of: Callable, corpus: Path, data_dir: Path
) -> None:
    """The holder of the lock stands for a build in another process, which is killed."""
    mixture = mixture_of()
    data_dir.mkdir()
    lock = data_dir / f".{mixture.name}.lock"
    hold = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    said = io.StringIO()
    with (
        subprocess.Popen([sys.executable, "-c", f"{hold}; time.sleep(600)"], stdout=subprocess.PIPE) as first,
        ThreadPoolExecutor(1) as pool,
    ):
        assert first.stdout is not None
        first.stdout.readline()
        second = pool.submit(build, mixture, data_dir, corpus_dir=corpus, processes=1, console=Console(file=said))
        while "another process is building it" not in said.getvalue():
            assert not second.done()
            time.sleep(0.01)
        assert not (data_dir / mixture.name).exists()
        first.kill()
        assert second.result() == data_dir / mixture.name
    TokenDataset.open(mixture, data_dir)


def test_a_stopped_build_keeps_its_shards_and_ends_the_same(
    mixture_of: Callable, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = mixture_of(shard_tokens=1500)
    whole = read_manifest(build(mixture, tmp_path / "whole", corpus_dir=corpus, processes=1))
    assert len(whole.domains["prose"].train.shards) > 4

    closed = 0
    close_shard = ShardWriter.close_shard

    def stop_after_five(writer: ShardWriter) -> None:
        nonlocal closed
        closed += 1
        if closed > 10:
            raise KeyboardInterrupt
        close_shard(writer)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "close_shard", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            build(mixture, tmp_path / "stopped", corpus_dir=corpus, processes=1)
    folder = tmp_path / "stopped" / "small"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    assert kept
    with pytest.raises(UserError, match="no such data set"):
        TokenDataset.open(mixture, folder.parent)

    build(mixture, tmp_path / "stopped", corpus_dir=corpus, processes=1)
    assert read_manifest(folder) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.glob("**/*.tmp"))


@pytest.fixture
def endless_build(
    mixture_of: Callable, corpus: Path, data_dir: Path, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """`fp8lab data build` with a worker that reads a pipe into which nobody writes, and one that has nothing to do.

    Every process of the build has its standard error, which therefore ends when the last one has.
    """
    mixture_of()
    pipe = corpus / "prose" / "00.jsonl"
    pipe.unlink()
    os.mkfifo(pipe)
    arguments = ["data", "build", tmp_path / "small.yaml", "--corpus", corpus, "--data-dir", data_dir, "--processes=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fp8lab.cli", *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Tests that run in a shell's background inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(process.communicate)
        cleanup.callback(kill_session, process.pid)
        others = len(list(corpus.rglob("*.jsonl"))) - 1
        while len(list(data_dir.glob("small/.build/*[0-9].npz"))) < others:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        cleanup.callback(os.close, os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # fails unless a worker reads it
        yield process


def kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_build_that_is_killed(
    endless_build: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    endless_build.send_signal(number)
    endless_build.communicate(timeout=PATIENCE_SECONDS)  # until standard error ends: no process is left
    assert endless_build.returncode == -number


def test_an_interrupt_from_the_terminal_ends_a_build_without_a_traceback(
    endless_build: subprocess.Popen[bytes],
) -> None:
    os.killpg(endless_build.pid, signal.SIGINT)
    _, said = endless_build.communicate(timeout=PATIENCE_SECONDS)
    assert endless_build.returncode == 130
    assert b"Traceback" not in said


def test_a_failure_of_one_worker_does_not_wait_for_the_others() -> None:
    with pytest.raises(TypeError), WorkerPool(2, Console(quiet=True)) as pool:
        pool.map("sleep", time.sleep, [100_000, "not seconds"])
    assert not multiprocessing.active_children()


def test_text_that_spells_a_special_token_stays_text(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    text = "before <|endoftext|> after " + sentence("x")
    write_jsonl(corpus / "code/00.jsonl", [text, sentence("y")])
    mixture = mixture_of()
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    shard = dataset.manifest.domains["code"].train.shards[0]
    tokens = np.fromfile(dataset.folder / shard.file, dtype="<u2")
    assert (tokens == dataset.encoding.eot_token).sum() == 2
    assert dataset.encoding.decode(tokens.tolist()).startswith(text)


def test_duplicates_are_removed_and_counted_and_validation_wins(
    mixture_of: Callable, corpus: Path, data_dir: Path
) -> None:
    held_out = read_texts(corpus / "prose/val.jsonl")[0]
    long = sentence("long", words=300)
    write_jsonl(
        corpus / "prose/02.jsonl", [held_out, sentence("prose00"), long, long.replace(long.split()[9], "x"), "  \n"]
    )
    mixture = mixture_of()
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    removed = dataset.manifest.domains["prose"].removed
    assert (removed.exact_duplicate, removed.near_duplicate, removed.empty) == (2, 1, 1)
    assert not set(documents(dataset, "prose")) & set(documents(dataset, "prose", "validation"))


def test_evaluation_text_is_removed_and_counted(
    mixture_of: Callable, corpus: Path, data_dir: Path, tmp_path: Path
) -> None:
    leaked = read_texts(corpus / "code/01.jsonl")[5]
    write_jsonl(tmp_path / "evaluation" / "task" / "test.jsonl", [" ".join(leaked.split()[10:30])])
    mixture = mixture_of(decontaminate=True)
    with pytest.raises(UserError, match="--eval-data"):
        build(mixture, data_dir, corpus_dir=corpus, processes=1)
    build(mixture, data_dir, corpus_dir=corpus, eval_data_dir=tmp_path / "evaluation", processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    assert dataset.manifest.domains["code"].removed.contaminated == 1
    assert dataset.manifest.domains["prose"].removed.contaminated == 0
    assert leaked not in documents(dataset, "code")
    assert dataset.manifest.decontamination.items == 1


def many(corpus: Path, count: int, bad: list[bytes]) -> None:
    """Make the code domain `count` good lines and the `bad` ones."""
    good = [json.dumps({"text": f"line {n} " + sentence(str(n), words=4)}).encode() for n in range(count)]
    (corpus / "code/01.jsonl").unlink()
    (corpus / "code/00.jsonl").write_bytes(b"\n".join([*good[:7], *bad, *good[7:]]) + b"\n")


BAD_LINES = [b'{"text": "cut off', b'{"text": "\xff\xfe not UTF-8"}', b'{"other": 1}', b'{"text": "\\ud800"}', b"[1]"]


def compress(path: Path, frames: int = 1) -> None:
    """Replace a file by its compressed form."""
    content = path.read_bytes()
    size = -(-len(content) // frames)
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    path.with_suffix(".jsonl.zst").write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))
    path.unlink()


@pytest.mark.parametrize(("bad", "packed"), [*((line, False) for line in BAD_LINES), (BAD_LINES[1], True)])
def test_an_unreadable_line_is_skipped_and_counted(
    mixture_of: Callable, corpus: Path, data_dir: Path, bad: bytes, packed: bool
) -> None:
    many(corpus, 1100, [bad])
    if packed:
        compress(corpus / "code/00.jsonl")
    mixture = mixture_of()
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    domain = read_manifest(data_dir / "small").domains["code"]
    assert domain.removed.unreadable == 1
    assert domain.train.documents == 1100 - domain.removed.near_duplicate - domain.removed.exact_duplicate


def test_more_than_a_thousandth_unreadable_is_refused(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    many(corpus, 1100, BAD_LINES[:2])
    with pytest.raises(UserError, match="'code': 2 of 1110 documents are unreadable"):
        build(mixture_of(), data_dir, corpus_dir=corpus, processes=1)


def test_an_empty_domain_is_refused_by_name(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    for path in (corpus / "code").glob("0*.jsonl"):
        path.write_text("")
    with pytest.raises(UserError, match="domain 'code' of mixture 'small' has no training text"):
        build(mixture_of(), data_dir, corpus_dir=corpus, processes=1)


def test_a_missing_corpus_or_file_is_refused(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"'prose'.*--corpus DIR"):
        build(mixture_of(), data_dir)
    (corpus / "code/val.jsonl").unlink()
    with pytest.raises(UserError, match=r"'code': validation 'code/val\.jsonl\*' matches no file"):
        build(mixture_of(), data_dir, corpus_dir=corpus)
    assert not data_dir.exists()


@pytest.mark.parametrize("occupied", ["data", "data/small"])
def test_a_file_where_the_data_should_go_is_refused_before_work(
    mixture_of: Callable, corpus: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, occupied: str
) -> None:
    file = tmp_path / occupied
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    monkeypatch.setattr(WorkerPool, "map", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=f"{occupied}: cannot be made a folder"):
        build(mixture_of(), data_dir, corpus_dir=corpus, processes=1)
    assert file.read_text() == "mine"


def test_a_pattern_must_stay_in_the_corpus_folder(mixture_of: Callable, corpus: Path, data_dir: Path) -> None:
    source = {"kind": "jsonl", "train": ["../*.jsonl"], "licence": "CC0"}
    with pytest.raises(UserError, match="must stay inside the corpus folder"):
        build(mixture_of(domains={"code": {"weight": 1, "source": source}}), data_dir, corpus_dir=corpus)


def test_a_line_over_the_limit_is_refused_by_number(
    mixture_of: Callable, corpus: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed before the length was checked"))
    many(corpus, 20, [b'{"text": "' + b"x" * 10_000 + b'"}'])
    with pytest.raises(UserError, match=r"00\.jsonl: line 8 is longer than"):
        list(sources.JsonlPart("code", "train", 0, corpus / "code/00.jsonl", "text").documents())


@given(st.text(alphabet="ab\n", max_size=60), st.integers(1, 20))
def test_pieces_are_the_text_cut_at_line_ends(text: str, characters: int) -> None:
    with mock.patch.object(sources, "PIECE_CHARACTERS", characters):
        parts = list(sources.pieces(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= characters for part in parts)
    for part in parts[:-1]:
        assert part.endswith("\n") or "\n" not in part


def test_a_long_document_is_tokenised_in_pieces(encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 100)
    text = "".join(sentence(str(n), words=9) for n in range(30))
    arrays = list(encode_document(encoding, text))
    assert len(arrays) > 20
    tokens = np.concatenate(arrays).tolist()
    assert tokens[-1] == encoding.eot_token
    assert encoding.decode(tokens[:-1]) == text


@pytest.mark.parametrize("frames", [1, 2])
def test_compressed_files_are_read_whole(mixture_of: Callable, corpus: Path, tmp_path: Path, frames: int) -> None:
    text = "Élan, \N{GRINNING FACE} 東京\u2028 " + sentence("not ASCII")
    line = json.dumps({"text": text}, ensure_ascii=False)
    (corpus / "code/02.jsonl").write_text(line + "\n", encoding="utf-8")
    plain = read_manifest(build(mixture_of(), tmp_path / "plain", corpus_dir=corpus, processes=1))
    for path in corpus.rglob("*.jsonl"):
        compress(path, frames)
    mixture = mixture_of()
    packed = read_manifest(build(mixture, tmp_path / "packed", corpus_dir=corpus, processes=1))
    assert packed.data_sha256 == plain.data_sha256
    assert text in documents(TokenDataset.open(mixture, tmp_path / "packed"), "code")


def test_without_validation_files_documents_are_held_out_by_content(
    mixture_of: Callable, corpus: Path, data_dir: Path
) -> None:
    source = {"kind": "jsonl", "train": ["prose/*.jsonl"], "validation_fraction": 0.2, "licence": "CC0"}
    mixture = mixture_of(domains={"prose": {"weight": 1, "source": source}})
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    train, validation = documents(dataset, "prose"), documents(dataset, "prose", "validation")
    assert len(train) + len(validation) == 88
    assert 6 < len(validation) < 32
    assert not set(train) & set(validation)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out as a hub data set: a card and Parquet files, two languages mixed."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        rows = [
            {"body": sentence(f"hub{shard}{n}"), "metadata": {"language": "C" if n % 2 else "Python"}}
            for n in range(100)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"train-{shard:05d}-of-00002.parquet")
    (folder / "README.md").write_text(
        "---\nlicense: cc0-1.0\nconfigs:\n- config_name: sample\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n---\n# Test\n"
    )
    return folder


def hub_mixture(mixture_of: Callable, hub: Path, **fields: object) -> MixtureConfig:
    source = {
        "kind": "hub",
        "dataset": str(hub),
        "subset": "sample",
        "revision": "main",
        "text_field": "body",
        "where": {"metadata.language": "C"},
        "licence": "CC0",
        "parts": 2,
        "max_tokens": 1_000_000,
        "validation_fraction": 0.1,
    } | fields
    return mixture_of(domains={"code": {"weight": 1, "source": source}})


def test_a_hub_data_set_is_streamed_filtered_and_split(mixture_of: Callable, hub: Path, data_dir: Path) -> None:
    mixture = hub_mixture(mixture_of, hub)
    build(mixture, data_dir, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    train, validation = documents(dataset, "code"), documents(dataset, "code", "validation")
    wanted = {sentence(f"hub{shard}{n}") for shard in range(2) for n in range(1, 100, 2)}
    assert set(train) | set(validation) == wanted
    assert not set(train) & set(validation)
    assert validation


def test_evaluation_text_is_removed_from_a_stream_too(
    mixture_of: Callable, hub: Path, data_dir: Path, tmp_path: Path
) -> None:
    leaked = sentence("hub15")
    write_jsonl(tmp_path / "evaluation" / "test.jsonl", [leaked])
    mixture = hub_mixture(mixture_of, hub).model_copy(update={"decontaminate": True})
    build(mixture, data_dir, eval_data_dir=tmp_path / "evaluation", processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    assert dataset.manifest.domains["code"].removed.contaminated == 1
    assert leaked not in documents(dataset, "code") + documents(dataset, "code", "validation")


def test_named_files_of_a_hub_data_set_are_read_alone(mixture_of: Callable, tmp_path: Path, data_dir: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(3):
        rows = [{"text": sentence(f"{number}/{n}"), "metadata": {"language": "C"}} for n in range(60)]
        with gzip.open(folder / f"part-{number}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    mixture = hub_mixture(
        mixture_of, folder, subset=None, data_files=["part-[12].json.gz"], text_field="text", where={}
    )
    build(mixture, data_dir, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    read = documents(dataset, "code") + documents(dataset, "code", "validation")
    assert set(read) == {sentence(f"{number}/{n}") for number in (1, 2) for n in range(60)}


def test_a_hub_build_stops_at_its_tokens(mixture_of: Callable, hub: Path, data_dir: Path) -> None:
    build(hub_mixture(mixture_of, hub, max_tokens=3000), data_dir, processes=1)
    tokens = read_manifest(data_dir / "small").domains["code"].train.tokens
    assert 3000 <= tokens < 4000  # each of the two parts ends with the document that fills it


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_field": "text"}, "no column 'text'; it has body, metadata"),
        ({"parts": 3}, "parts: 3 is more than the 2 files"),
    ],
)
def test_a_hub_source_that_does_not_fit_is_refused(
    mixture_of: Callable, hub: Path, data_dir: Path, fields: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(hub_mixture(mixture_of, hub, **fields), data_dir, processes=1)


def test_a_build_writes_a_data_record(mixture_of: Callable, corpus: Path, data_dir: Path, tmp_path: Path) -> None:
    mixture = mixture_of()
    build(mixture, data_dir, corpus_dir=corpus, processes=1, records_dir=tmp_path / "records")
    record = records.read(tmp_path / "records/data/small")
    assert isinstance(record, records.DataRecord)
    assert record.provenance.data_sha256 == TokenDataset.open(mixture, data_dir).sha256
    assert record.results["domains"]["code"]["train"]["documents"] == 80
    assert record.results["domains"]["code"]["removed"]["unreadable"] == 0
    assert record.results["peak_memory_bytes"] > 10_000_000


def test_a_mixture_is_built_with_gpt2s_encoding_without_network(
    mixture_of: Callable, corpus: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    mixture = mixture_of(tokenizer="gpt2")
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    dataset = TokenDataset.open(mixture, data_dir)
    assert dataset.encoding.n_vocab == 50_257
    assert set(documents(dataset, "code", "validation")) == set(read_texts(corpus / "code/val.jsonl"))


def test_a_trained_tokenizer_serves_a_mixture(
    mixture_of: Callable, corpus: Path, data_dir: Path, tmp_path: Path
) -> None:
    from fp8lab import tokenizer

    out = tmp_path / "tokenizers" / "own.tiktoken"
    encoding = train_tokenizer(mixture_of(), 544, out, corpus_dir=corpus)
    assert encoding.n_vocab == 544
    assert list(out.parent.iterdir()) == [out]
    mixture = mixture_of(tokenizer={"file": "tokenizers/own.tiktoken", "sha256": tokenizer.sha256(encoding)})
    build(mixture, data_dir, corpus_dir=corpus, processes=1)
    assert TokenDataset.open(mixture, data_dir).tokenizer_sha256 == tokenizer.sha256(encoding)


@pytest.mark.parametrize(
    ("vocab_size", "name", "message"),
    [(1000, "ranks", "1000 is no multiple of 16"), (544, "folder", "folder: is a folder; name the file to write")],
)
def test_a_tokenizer_that_cannot_be_is_refused_before_work(
    mixture_of: Callable,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vocab_size: int,
    name: str,
    message: str,
) -> None:
    (tmp_path / "out" / "folder").mkdir(parents=True)
    monkeypatch.setattr(WorkerPool, "map", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=message):
        train_tokenizer(mixture_of(), vocab_size, tmp_path / "out" / name, corpus_dir=corpus)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["folder"]
