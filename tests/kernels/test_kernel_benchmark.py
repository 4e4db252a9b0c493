"""The kernels' benchmark at toy shapes: what it checks, times and writes down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fp8lab import records
from fp8lab.config import ModelConfig
from fp8lab.errors import UserError
from fp8lab.kernels import reference
from fp8lab.timing import replayed

MODEL = ModelConfig(name="tiny", d_model=64, n_layers=1, n_heads=1, d_ff=64, vocab_size=256, seq_len=32)


@pytest.fixture
def kernels(monkeypatch, device):
    """The module, with two kernels of one tiny model, and a clock by which a call takes 0.1 ms."""
    # Imports Triton, which the interpreter's switch must come before.
    from fp8lab.kernels import benchmark

    kept = {name: benchmark.CANDIDATES[name] for name in ("quantise", "swiglu")}
    kept = {name: candidates._replace(tiles=candidates.tiles[:2]) for name, candidates in kept.items()}
    monkeypatch.setattr(benchmark, "CANDIDATES", kept)
    monkeypatch.setattr(benchmark, "MODELS", {"tiny": MODEL})
    monkeypatch.setattr(benchmark, "SIZES", {"tiny": 2})
    monkeypatch.setattr(benchmark, "SEQ", 32)
    monkeypatch.setattr(benchmark, "SUMMED", {"tiny": 512})
    monkeypatch.setattr(benchmark, "gpu_milliseconds", lambda function, calls, telemetry=None: 0.1 * benchmark.REPEATS)
    monkeypatch.setattr(benchmark, "replayed", lambda function, calls: function)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(benchmark, "_gpu", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Toy GPU (1 GB)")
    return benchmark


def run(kernels, tmp_path: Path) -> tuple[records.BenchmarkRecord, list[str]]:
    done = CliRunner().invoke(kernels.app, ["--records-dir", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = records.read(tmp_path / "benchmarks" / "kernels-Toy-GPU-1-GB")
    assert isinstance(record, records.BenchmarkRecord)
    return record, done.output.splitlines()


def test_a_record_keeps_every_tile_and_a_line_tells_of_each_kernel(kernels, tmp_path) -> None:
    record, lines = run(kernels, tmp_path)
    assert record.provenance.device_name == "Toy GPU (1 GB)"
    assert record.provenance.command.startswith("python -m fp8lab.kernels.benchmark")
    rows = record.results["rows"]
    assert [row["kernel"] for row in rows] == ["quantise", "quantise", "swiglu", "swiglu"]
    # 64 rows of 64 numbers, read in BF16 and written in FP8.
    assert rows[0] == {
        "size": "tiny", "kernel": "quantise", "constant": "FLAT", "tile": [4, 512, 4, None, 1], "bytes": 64 * 64 * 3,
        "ms": pytest.approx(0.1), "sm_clock_mhz": None,
    }  # fmt: skip
    assert lines[0] == "Toy GPU (1 GB): a copy moves 1.00 TB/s"
    timed, sums = lines[1:3], lines[3:]
    assert [line.split()[:2] for line in timed] == [["tiny", "quantise"], ["tiny", "swiglu"]]
    # 12 KiB in a tenth of a millisecond are 0.12 GB/s.
    assert "100us 0.00" in lines[1]
    assert len(sums) == len(record.results["accumulation"]) == 9
    assert sums[0].startswith(" tiny output           64 terms, mean 0: fast accumulation ")


def test_a_tile_that_computes_something_else_is_not_timed(kernels, tmp_path, monkeypatch) -> None:
    real = kernels.triton_ops.swiglu

    def swiglu(gate_up, slot):
        activated = real(gate_up, slot)
        wrong = kernels.CANDIDATES["swiglu"].tiles[1] == kernels.triton_ops.SWIGLU
        return activated.float().mul(2).to(activated.dtype) if wrong else activated

    monkeypatch.setattr(kernels.triton_ops, "swiglu", swiglu)
    record, lines = run(kernels, tmp_path)
    right, wrong = (row for row in record.results["rows"] if row["kernel"] == "swiglu")
    assert right["ms"] == pytest.approx(0.1)
    assert "ms" not in wrong
    assert "output 0: " in wrong["error"]
    assert wrong["error"] in lines[2]


def test_sums_that_lose_nothing_are_told_from_sums_that_do(kernels, device) -> None:
    def matmul(a, b, a_slot, b_slot, dtype, fast):
        product = reference.matmul(a, b, a_slot, b_slot, dtype, fast)
        return product * 1.01 if fast else product

    rows = kernels.accumulation_errors("tiny", device, matmul)
    assert {(row["gemm"], row["terms"]) for row in rows} == {("output", 64), ("grad_input", 192), ("grad_weight", 512)}
    for row in rows:
        assert row["fast"] == pytest.approx(0.01, rel=1e-3)
        assert row["precise"] < 1e-5


@pytest.mark.gpu
def test_a_replay_does_the_work_of_all_calls() -> None:
    total = torch.zeros((), device="cuda")
    replay = replayed(lambda: total.add_(1), calls=5)
    torch.cuda.synchronize()
    total.zero_()
    replay()
    replay()
    assert total.item() == 10


def test_a_share_is_a_number_below_the_number_of_shares(kernels) -> None:
    assert kernels._parse_share("1/2") == (1, 2)
    for text in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(UserError, match="--compile"):
            kernels._parse_share(text)
