"""Which tile suits each kernel: correctness first, then bytes a second beside those of a plain copy.

    python -m fp8lab.kernels.benchmark

A kernel of the fused path is as good as the memory bandwidth that it reaches, and that depends on the tile that one
program holds. Every kernel is run with every candidate on a GPU, at the shapes of four model sizes, and each result
is compared with the plain-PyTorch reference before it is timed. A line for each kernel and size tells its tiles, from
the fastest on; all of it goes into a benchmark record (`fp8lab.measurement`),
``runs/records/benchmarks/kernels-<device>/``. The tiles in use are constants of `fp8lab.kernels.triton_ops`.

Beside them stands what the sums of the FP8 GEMMs lose, with fast accumulation and without (`accumulation_errors`).

The compiler takes longer than the measurements. ``--compile I/N`` only compiles the I-th share of the candidates, for
N processes at once to fill Triton's cache.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from fp8lab.config import MODELS
from fp8lab.errors import UserError
from fp8lab.kernels import problems, triton_ops
from fp8lab.kernels.problems import Problem
from fp8lab.kernels.scaling import DTYPES, Slot
from fp8lab.kernels.triton_ops import Tile
from fp8lab.measurement import begin_provenance, run_app, slug, write_benchmark
from fp8lab.timing import Telemetry, gpu_milliseconds, replayed

SIZES = {"1.5B": 16, "350M": 32, "125M": 64, "48M": 128}
"""Sequences of 1,024 tokens."""
SEQ = 1024
COMPILING_SEQUENCES = 2
"""Of the calls that compile and check."""
REPEATS = 12
REPLAYS = 3
"""Of as many calls; the median counts."""
E4M3 = DTYPES["e4m3"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


BOTH = [
    Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 64, 4, 128), Tile(64, 64, 8, 80), Tile(64, 128, 8), Tile(128, 64, 8),
    Tile(32, 64, 4), Tile(128, 64, 16),
]  # fmt: skip
IN_GROUPS = [
    Tile(64, 64, 4, None, 2), Tile(64, 64, 4, None, 4), Tile(64, 64, 4, None, 16), Tile(64, 64, 4, 128, 4),
    Tile(64, 128, 8, None, 2), Tile(64, 128, 8, None, 4), Tile(64, 128, 8, None, 16),
]  # fmt: skip
"""Tiles of `BOTH` in other orders (`triton_ops._block`)."""
FLAT = [Tile(4, 512, 4), Tile(1, 2048, 4), Tile(4, 512, 8), Tile(8, 512, 8), Tile(2, 512, 2), Tile(8, 512, 16)]
ROWS = [Tile(4096, 0, 4), Tile(1024, 0, 1), Tile(2048, 0, 2), Tile(2048, 0, 1), Tile(2048, 0, 4), Tile(4096, 0, 8)]
HEADS = [Tile(64, 0, 4), Tile(32, 0, 4), Tile(64, 0, 8), Tile(128, 0, 8), Tile(32, 0, 2)]
HEADS_BACKWARD = [
    Tile(32, 4, 4), Tile(32, 4, 4, 128), Tile(64, 4, 4), Tile(64, 4, 8), Tile(16, 4, 4), Tile(32, 4, 2), Tile(32, 2, 4),
    Tile(32, 16, 4),
]  # fmt: skip
LOGITS = [
    Tile(4, 4096, 16), Tile(2, 2048, 4), Tile(4, 1024, 4), Tile(4, 2048, 8), Tile(2, 4096, 8), Tile(4, 8192, 32),
    Tile(2, 4096, 16),
]  # fmt: skip


class Candidates(NamedTuple):
    """What one measurement compares."""

    call: problems.MakeCall
    constant: str
    """Name of the tile in `triton_ops`."""
    tiles: list[Tile]


CANDIDATES = {
    "quantise": Candidates(problems.quantise, "FLAT", FLAT),
    "quantise_both": Candidates(problems.quantise_both, "BOTH", [*BOTH, *IN_GROUPS]),
    "quantise_both, weight": Candidates(problems.quantise_weight, "BOTH", [*BOTH, *IN_GROUPS]),
    "quantise_transposed": Candidates(
        problems.quantise_transposed, "TRANSPOSED", [Tile(64, 128, 8), *BOTH[:3], *IN_GROUPS]
    ),
    "rms_norm": Candidates(problems.rms_norm, "ROWS", ROWS),
    "rms_norm, no branch": Candidates(problems.rms_norm_alone, "ROWS", ROWS),
    "rms_norm_backward": Candidates(problems.rms_norm_backward, "NORM_BACKWARD", [*BOTH, *IN_GROUPS]),
    "swiglu": Candidates(problems.swiglu, "SWIGLU", FLAT),
    "swiglu_backward": Candidates(problems.swiglu_backward, "SWIGLU_BACKWARD", [*BOTH, *IN_GROUPS]),
    "norm_rotate": Candidates(problems.norm_rotate, "HEADS", HEADS),
    "norm_rotate_backward": Candidates(problems.norm_rotate_backward, "HEADS_BACKWARD", HEADS_BACKWARD),
    "cross_entropy": Candidates(problems.cross_entropy, "CROSS_ENTROPY", LOGITS),
    "cross_entropy, short rows": Candidates(problems.cross_entropy_short, "CROSS_ENTROPY_SHORT", LOGITS),
    "cross_entropy_alone": Candidates(problems.cross_entropy_alone, "LOGSUMEXP", LOGITS),
    "cross_entropy_quantised": Candidates(
        problems.cross_entropy_quantised, "LOGITS_GRADIENT", [*BOTH[:2], *BOTH[3:6], *IN_GROUPS]
    ),
}


def moved_bytes(name: str, arguments: list[Any], outputs: tuple[Any, ...]) -> int:
    """Bytes that one call must read and write: each tensor once."""
    inputs = [part for argument in arguments for part in (argument if isinstance(argument, tuple) else (argument,))]
    tensors = [tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor) and tensor.numel() > 4]
    total = sum(tensor.nbytes for tensor in tensors)
    if name == "norm_rotate":
        total -= arguments[0].nbytes // 3  # v stays where it is
    if name == "rms_norm" and arguments[1] is None:
        total -= arguments[0].nbytes  # returned, not written
    return total


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_milliseconds(lambda: target.copy_(source), REPEATS) * 1e3


def compile_share(share: int, shares: int, device: torch.device) -> None:
    """Compile and check every `shares`-th candidate, from the `share`-th on."""
    everything = [(size, name, tile) for size in SIZES for name in CANDIDATES for tile in CANDIDATES[name].tiles]
    for size, name, tile in everything[share::shares]:
        _checked(CANDIDATES[name], size, tile, device)


def _checked(candidates: Candidates, size: str, tile: Tile, device: torch.device) -> str | None:
    """What is wrong with a kernel under `tile`, None if nothing is."""
    call = candidates.call(Problem(MODELS[size], COMPILING_SEQUENCES, SEQ, device))
    with _tile(candidates.constant, tile):
        try:
            return problems.disagreement(*call)
        except Exception as error:
            # A candidate that does not compile or run must not end the benchmark.
            return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@contextlib.contextmanager
def _tile(constant: str, tile: Tile) -> Iterator[None]:
    before = getattr(triton_ops, constant)
    setattr(triton_ops, constant, tile)
    try:
        yield
    finally:
        setattr(triton_ops, constant, before)


def measure(size: str, name: str, device: torch.device) -> list[dict[str, Any]]:
    """A row for each candidate of one kernel at the shapes of one size: its time and the GPU's clock, or its error."""
    candidates = CANDIDATES[name]
    operation, arguments = candidates.call(Problem(MODELS[size], SIZES[size], SEQ, device))
    function = functools.partial(getattr(triton_ops, operation), *arguments)
    count = moved_bytes(operation, arguments, problems.outputs(function()))
    rows = []
    for tile in candidates.tiles:
        row = {"size": size, "kernel": name, "constant": candidates.constant, "tile": list(tile), "bytes": count}
        wrong = _checked(candidates, size, tile, device)
        if wrong is None:
            telemetry = Telemetry()
            with _tile(candidates.constant, tile):
                row["ms"] = gpu_milliseconds(replayed(function, REPEATS), REPLAYS, telemetry) / REPEATS
            clock = telemetry.median_clock_mhz
            row["sm_clock_mhz"] = None if math.isnan(clock) else clock
        else:
            row["error"] = wrong
        rows.append(row)
    return rows


SUMMED = {"7M": 128 * 1024, "125M": 64 * 1024, "1.5B": 16 * 2048}
"""Tokens of a micro-batch, as many as a weight gradient sums over, in the plans of these sizes."""
MEANS = (0.0, 0.1, 0.3)
"""Of both operands, in standard deviations: what tokens have in common makes sums grow with their length."""
OUTPUTS = 256
"""Rows and columns of a product that is compared: every output is as good a sample."""


def accumulation_errors(size: str, device: torch.device, matmul: Callable[..., Tensor]) -> list[dict[str, Any]]:
    """How far a block's products lie from the exact sums of the same FP8 numbers, of Gaussian E4M3 operands.

    Returns:
        A row a GEMM of the qkv Linear and mean of the operands: terms (of each sum), mean (in standard deviations), and
        the root mean square error relative to the exact product's, ``fast`` and ``precise`` (summed in FP32).
    """
    model = MODELS[size]
    terms = {"output": model.d_model, "grad_input": 3 * model.d_model, "grad_weight": SUMMED[size]}
    generator = torch.Generator(device).manual_seed(1)
    rows = []
    for gemm, mean in itertools.product(terms, MEANS):
        slot = Slot(torch.tensor([1.0, 1.0, 0.0, 0.0], device=device), torch.zeros(4, device=device), E4M3)
        shape = (OUTPUTS, terms[gemm])
        a, b = ((20 * (mean + torch.randn(shape, generator=generator, device=device))).to(E4M3) for _ in range(2))
        exact = a.double() @ b.double().t()
        products = {name: matmul(a, b, slot, slot, torch.float32, name == "fast") for name in ("fast", "precise")}
        errors = {name: float((product - exact).norm() / exact.norm()) for name, product in products.items()}
        rows.append({"size": size, "gemm": gemm, "terms": terms[gemm], "mean": mean, **errors})
    return rows


@app.command()
def command(
    share: Annotated[
        str | None,
        typer.Option("--compile", metavar="I/N", help="Only compile share I of N (from 0), and measure nothing."),
    ] = None,
    records_dir: Annotated[Path, typer.Option(help="Folder of run records.")] = Path("runs/records"),
) -> None:
    """Check and time every tile of every kernel on this GPU, and write the record."""
    device = _gpu()
    if share is not None:
        compile_share(*_parse_share(share), device)
        return
    name = torch.cuda.get_device_name()
    provenance = begin_provenance("fp8lab.kernels.benchmark", name)
    bandwidth = copy_bandwidth(device)
    print(f"{name}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for size in SIZES:
        for kernel in CANDIDATES:
            measured = measure(size, kernel, device)
            print(_line(measured, bandwidth), flush=True)
            rows += measured
    sums = [row for size in SUMMED for row in accumulation_errors(size, device, triton_ops.matmul)]
    for row in sums:
        print(f"{row['size']:>5} {row['gemm']:<11} {row['terms']:>7,} terms, mean {row['mean']:g}: "
              f"fast accumulation {row['fast']:.2%}, FP32 {row['precise']:.2%} off")  # fmt: skip
    results = {
        "copy_bytes_per_second": bandwidth, "calls": REPEATS, "sequences": SIZES, "seq_len": SEQ, "rows": rows,
        "accumulation": sums,
    }  # fmt: skip
    write_benchmark(f"kernels-{slug(name)}", results, provenance, records_dir)


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("kernels are timed on a GPU, and there is none")
    return torch.device("cuda")


def _parse_share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--compile: {text!r} is no share; write I/N, with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def _line(rows: list[dict[str, Any]], bandwidth: float) -> str:
    """Candidates from the fastest on: microseconds, and the share of a copy's bandwidth."""
    parts = []
    for row in sorted(rows, key=lambda row: row.get("ms", float("inf"))):
        share = row["bytes"] / (row["ms"] * 1e-3) / bandwidth if "ms" in row else 0.0
        result = f"{row['ms'] * 1e3:.0f}us {share:.2f}" if "ms" in row else row["error"]
        *sides, group = row["tile"]
        grouped = f" by {group}" if group > 1 else ""
        parts.append(f"{'x'.join(map(str, filter(None, sides)))}{grouped} {result}")
    return f"{rows[0]['size']:>5} {rows[0]['kernel']:<34} " + " | ".join(parts)


if __name__ == "__main__":
    run_app(app)
