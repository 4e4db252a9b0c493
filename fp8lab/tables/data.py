"""The training text and the path that it takes, for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fp8lab.analysis.composition import data_composition
from fp8lab.errors import UserError
from fp8lab.records import BenchmarkRecord, DataRecord
from fp8lab.units import number


def data_table(record: DataRecord) -> pd.DataFrame:
    """`data_composition` for reading."""
    table = data_composition(record)
    return pd.DataFrame(
        {
            "domain": table["domain"],
            "share of each batch": table["weight"].map("{:.0%}".format),
            "documents": table["documents"].map("{:,}".format),
            "training tokens": table["train_tokens"].map(number),
            "validation tokens": table["validation_tokens"].map(number),
            "documents removed": table["removed"].map("{:,}".format),
        }
    )


def data_benchmarks(benchmarks: Sequence[BenchmarkRecord]) -> pd.DataFrame:
    """What the data path must keep up with, and what was measured (records of `fp8lab.data.benchmark`).

    Raises:
        UserError: a field is missing.
    """
    rows = []
    for record in benchmarks:
        try:
            rows += _BENCHMARK_ROWS[record.run](record.results) if record.run in _BENCHMARK_ROWS else []
        except KeyError as error:
            raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows, columns=["what", "median", "range", "goal"])


def _loader_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    speed = results["tokens_per_second"]
    what = f"loader, batches of {results['batch_tokens']:,} tokens (tokens/s)"
    return [(what, number(speed["median"]), f"{number(speed['min'])} to {number(speed['max'])}", "≥ 10M")]


def _tokenise_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def row(what: str, key: str, digits: int, goal: str) -> tuple[str, ...]:
        value = results[key]
        spread = f"{value['min']:.{digits}f} to {value['max']:.{digits}f}"
        return what, f"{value['median']:.{digits}f}", spread, goal

    return [
        row("tokenising in the build, files to shards (MB/s)", "build_megabytes_per_second", 1, "–"),
        row("tiktoken's batch encoding, from memory (MB/s)", "tiktoken_megabytes_per_second", 1, "–"),
        row("build / tiktoken, round by round", "ratio", 2, "≥ 0.80"),
    ]


def _memory_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    what = f"peak memory of a process, documents of {results['document_bytes'] / 1e6:.0f} MB (GiB)"
    return [(what, f"{results['peak_memory_bytes'] / 2**30:.2f}", "–", "< 2")]


_BENCHMARK_ROWS = {"data-loader": _loader_rows, "data-memory": _memory_rows, "data-tokenise": _tokenise_rows}
