from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from typer.testing import CliRunner

from fp8lab import records, tokenizer
from fp8lab.data import MixtureConfig, TokenDataset, benchmark
from fp8lab.errors import UserError
from fp8lab.provenance import cpu_name


@pytest.fixture
def mixture(mixture_of: Callable, encoding: tiktoken.Encoding, tmp_path: Path) -> MixtureConfig:
    """The mixture of `corpus`, with a tokenizer that is a file."""
    (tmp_path / "own.tiktoken").write_bytes(tokenizer.ranks_text(encoding))
    return mixture_of(tokenizer={"file": "own.tiktoken", "sha256": tokenizer.sha256(encoding)})


def test_both_tokenisers_are_timed_on_the_same_text(mixture: MixtureConfig, corpus: Path) -> None:
    results = benchmark.time_tokenising(mixture, corpus, sample_bytes=4000, rounds=2, processes=1)
    assert 4000 <= results["text_bytes"] < 6000
    assert results["documents"] < results["tokens"] < results["text_bytes"]
    for own, other, ratio in zip(
        results["build_megabytes_per_second"]["rounds"],
        results["tiktoken_megabytes_per_second"]["rounds"],
        results["ratio"]["rounds"],
        strict=True,
    ):
        assert ratio == own / other
    assert len(results["ratio"]["rounds"]) == 2


def test_a_mixture_that_cannot_be_timed_is_refused(mixture_of: Callable, corpus: Path) -> None:
    with pytest.raises(UserError, match="its tokenizer is not a file"):
        benchmark.time_tokenising(mixture_of(), corpus, sample_bytes=100, rounds=1, processes=1)


def test_the_loader_is_timed_in_tokens(write_dataset: Callable) -> None:
    dataset = TokenDataset.open(*write_dataset({"only": [np.arange(3000)]}))
    results = benchmark.time_loader(dataset, seq_len=16, batch_tokens=64, steps=3, rounds=4)
    speeds = results["tokens_per_second"]
    assert len(speeds["rounds"]) == 4
    assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]


def test_a_long_document_is_built_to_measure_memory(mixture: MixtureConfig) -> None:
    results = benchmark.measure_memory(mixture, document_bytes=50_000, processes=1)
    assert results["tokens"] > 2 * 50_000 / 8
    assert results["peak_memory_bytes"] > 10_000_000


def test_the_command_writes_a_record_that_repeats_it(
    mixture: MixtureConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["tokenise", "--corpus", "corpus", "--mixture", "small.yaml", "--sample-bytes", "2000"]
    arguments += ["--rounds", "1", "--processes", "1", "--records-dir", "records"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmark.py", *arguments])
    outcome = CliRunner().invoke(benchmark.app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    record = records.read(tmp_path / "records/benchmarks/data-tokenise")
    assert isinstance(record, records.BenchmarkRecord)
    assert record.provenance.command == "python -m fp8lab.data.benchmark " + " ".join(arguments)
    assert record.provenance.device_name == cpu_name()
    assert record.provenance.tokenizer_sha256 == mixture.tokenizer.sha256  # type: ignore[union-attr]
    assert record.results["ratio"]["rounds"]
