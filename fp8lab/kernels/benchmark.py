"""Which tile suits each kernel: correctness first, then bytes a second beside those of a plain copy.

    python -m fp8lab.kernels.benchmark

A kernel of the fused path is as good as the memory bandwidth that it reaches, and that depends on the tile that one
program holds. Every kernel is run with every candidate on a GPU, at the shapes of four model sizes, and each result
is compared with the plain-PyTorch reference before it is timed. A line for each kernel and size tells its tiles, from
the fastest on; all of it goes into a benchmark record (`fp8lab.measurement`),
``runs/records/benchmarks/kernels-<device>/``. The tiles in use are constants of `fp8lab.kernels.triton_ops`.

The compiler takes longer than the measurements. ``--compile I/N`` only compiles the I-th share of the candidates, for
N processes at once to fill Triton's cache.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from fp8lab.config import LADDER_VOCAB, MODELS, ModelConfig
from fp8lab.errors import UserError
from fp8lab.kernels import reference, triton_ops
from fp8lab.kernels.scaling import Slot
from fp8lab.kernels.triton_ops import Tile
from fp8lab.measurement import begin_provenance, run_app, slug, write_benchmark
from fp8lab.timing import Telemetry, gpu_milliseconds

SIZES = {"1.5B": 16, "350M": 32, "125M": 64, "48M": 128}
"""Sequences of 1,024 tokens."""
SEQ = 1024
COMPILING_SEQUENCES = 2
"""Of the calls that compile and check."""
REPEATS = 12
HEAD_ROWS = 16_384
"""Rows of logits a chunk of the head."""
EPSILON = 1e-6

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class Problem:
    """Random tensors of one model's shapes."""

    def __init__(self, model: ModelConfig, sequences: int, device: torch.device) -> None:
        self.model, self.rows, self.sequences, self.device = model, sequences * SEQ, sequences, device
        self.generator = torch.Generator(device).manual_seed(1)

    def slot(self, dtype: torch.dtype = torch.float8_e4m3fn, scale: float = 64.0) -> Slot:
        return Slot(
            torch.tensor([1 / scale, scale, 0, 0], device=self.device), torch.zeros(4, device=self.device), dtype
        )

    def bf16(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def fp32(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) + 0.5


Call = tuple[str, list[Any]]
"""Name of an operation, and its arguments."""


def _quantise(p: Problem) -> Call:
    return "quantise", [p.bf16(p.rows, p.model.d_model), p.slot()]


def _quantise_both(p: Problem) -> Call:
    return "quantise_both", [p.bf16(p.rows, p.model.d_model), p.slot()]


def _quantise_weight(p: Problem) -> Call:
    return "quantise_both", [p.fp32(2 * p.model.d_ff, p.model.d_model), p.slot()]


def _quantise_transposed(p: Problem) -> Call:
    return "quantise_transposed", [p.bf16(p.rows, p.model.d_model), p.slot()]


def _rms_norm(p: Problem) -> Call:
    d = p.model.d_model
    return "rms_norm", [p.bf16(p.rows, d), p.bf16(p.rows, d), p.fp32(d), EPSILON, p.slot()]


def _rms_norm_alone(p: Problem) -> Call:
    d = p.model.d_model
    return "rms_norm", [p.bf16(p.rows, d), None, p.fp32(d), EPSILON, p.slot()]


def _rms_norm_backward(p: Problem) -> Call:
    d = p.model.d_model
    x = p.bf16(p.rows, d)
    rstd = torch.rsqrt(x.float().square().mean(-1) + EPSILON)
    arguments = [p.bf16(p.rows, d), x, rstd, p.fp32(d), p.fp32(p.rows), p.bf16(p.rows, d)]
    return "rms_norm_backward", [*arguments, p.slot(), p.slot(), True]


def _swiglu(p: Problem) -> Call:
    return "swiglu", [p.bf16(p.rows, 2 * p.model.d_ff), p.slot()]


def _swiglu_backward(p: Problem) -> Call:
    return "swiglu_backward", [p.bf16(p.rows, 2 * p.model.d_ff), p.bf16(p.rows, p.model.d_ff), p.slot(), p.slot()]


def _angles(p: Problem) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(SEQ).float(), torch.linspace(1, 0.01, p.model.head_dim // 2)).to(p.device)
    return angle.cos(), angle.sin()


def _norm_rotate(p: Problem) -> Call:
    qkv, dim = p.bf16(p.rows, 3 * p.model.d_model), p.model.head_dim
    return "norm_rotate", [qkv, p.fp32(dim), p.fp32(dim), *_angles(p), p.model.n_heads, EPSILON]


def _norm_rotate_backward(p: Problem) -> Call:
    shape, dim = (p.sequences, SEQ, p.model.n_heads, p.model.head_dim), p.model.head_dim
    grads = tuple(p.bf16(*shape).transpose(1, 2) for _ in range(3))
    qkv = p.bf16(p.rows, 3 * p.model.d_model)
    return "norm_rotate_backward", [qkv, grads, p.fp32(dim), p.fp32(dim), *_angles(p), EPSILON, p.slot()]


def _logits(p: Problem) -> tuple[Tensor, Tensor]:
    rows, vocabulary = min(p.rows, HEAD_ROWS), p.model.vocab_size
    return p.bf16(rows, vocabulary), torch.randint(vocabulary, (rows,), generator=p.generator, device=p.device)


def _cross_entropy(p: Problem) -> Call:
    return "cross_entropy", [*_logits(p), 0.0]


def _cross_entropy_short(p: Problem) -> Call:
    vocabulary = LADDER_VOCAB
    targets = torch.randint(vocabulary, (HEAD_ROWS,), generator=p.generator, device=p.device)
    return "cross_entropy", [p.bf16(HEAD_ROWS, vocabulary), targets, 0.0]


def _cross_entropy_alone(p: Problem) -> Call:
    return "cross_entropy_alone", [*_logits(p)]


def _cross_entropy_quantised(p: Problem) -> Call:
    return "cross_entropy_quantised", [*_logits(p), 0.0, p.slot(torch.float8_e5m2, 2.0**15)]


BOTH = [
    Tile(64, 64, 4), Tile(64, 64, 8), Tile(64, 64, 16), Tile(64, 128, 8), Tile(128, 64, 8), Tile(64, 32, 4),
    Tile(128, 64, 16),
]  # fmt: skip
FLAT = [Tile(4, 512, 4), Tile(1, 2048, 4), Tile(4, 512, 8), Tile(8, 512, 8), Tile(2, 512, 2), Tile(8, 512, 16)]
ROWS = [Tile(4096, 0, 4), Tile(1024, 0, 1), Tile(2048, 0, 2), Tile(2048, 0, 1), Tile(2048, 0, 4), Tile(4096, 0, 8)]
HEADS = [Tile(64, 0, 4), Tile(32, 0, 4), Tile(64, 0, 8), Tile(128, 0, 8), Tile(32, 0, 2)]
LOGITS = [
    Tile(4, 4096, 16), Tile(2, 2048, 4), Tile(4, 1024, 4), Tile(4, 2048, 8), Tile(2, 4096, 8), Tile(4, 8192, 32),
    Tile(2, 4096, 16),
]  # fmt: skip


class Candidates(NamedTuple):
    """What one measurement compares."""

    call: Callable[[Problem], Call]
    constant: str
    """Name of the tile in `triton_ops`."""
    tiles: list[Tile]


CANDIDATES = {
    "quantise": Candidates(_quantise, "FLAT", FLAT),
    "quantise_both": Candidates(_quantise_both, "BOTH", BOTH),
    "quantise_both, weight": Candidates(_quantise_weight, "BOTH", BOTH),
    "quantise_transposed": Candidates(_quantise_transposed, "TRANSPOSED", [Tile(64, 128, 8), *BOTH[:4]]),
    "rms_norm": Candidates(_rms_norm, "ROWS", ROWS),
    "rms_norm, no branch": Candidates(_rms_norm_alone, "ROWS", ROWS),
    "rms_norm_backward": Candidates(_rms_norm_backward, "NORM_BACKWARD", BOTH),
    "swiglu": Candidates(_swiglu, "SWIGLU", FLAT),
    "swiglu_backward": Candidates(_swiglu_backward, "SWIGLU_BACKWARD", BOTH),
    "norm_rotate": Candidates(_norm_rotate, "HEADS", HEADS),
    "norm_rotate_backward": Candidates(_norm_rotate_backward, "HEADS_BACKWARD", [*HEADS, Tile(64, 0, 16)]),
    "cross_entropy": Candidates(_cross_entropy, "CROSS_ENTROPY", LOGITS),
    "cross_entropy, short rows": Candidates(_cross_entropy_short, "CROSS_ENTROPY_SHORT", LOGITS),
    "cross_entropy_alone": Candidates(_cross_entropy_alone, "LOGSUMEXP", LOGITS),
    "cross_entropy_quantised": Candidates(
        _cross_entropy_quantised, "LOGITS_GRADIENT", [Tile(64, 128, 8), *BOTH[:3], BOTH[-1]]
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


def _outputs(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def disagreement(name: str, arguments: list[Any]) -> str | None:
    """What is wrong with the kernel's result, None if it is the reference's."""
    expected = _outputs(getattr(reference, name)(*_copies(arguments)))
    actual = _outputs(getattr(triton_ops, name)(*_copies(arguments)))
    for position, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        if got is None or wanted is None:
            continue
        difference = (got.float() - wanted.float()).norm() / wanted.float().norm()
        # A rounding boundary crossed here and there, but no tile in a wrong place.
        if not difference < 0.01:
            return f"output {position} differs by {difference:.3f}"
    return None


def _copies(arguments: list[Any]) -> list[Any]:
    """Arguments whose logits may be overwritten, and whose amax is fresh."""
    return [
        argument.clone()
        if isinstance(argument, Tensor)
        else argument._replace(amax=torch.zeros_like(argument.amax))
        if isinstance(argument, Slot)
        else argument
        for argument in arguments
    ]


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
    call = candidates.call(Problem(MODELS[size], COMPILING_SEQUENCES, device))
    with _tile(candidates.constant, tile):
        try:
            return disagreement(*call)
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
    operation, arguments = candidates.call(Problem(MODELS[size], SIZES[size], device))
    function = functools.partial(getattr(triton_ops, operation), *arguments)
    count = moved_bytes(operation, arguments, _outputs(function()))
    rows = []
    for tile in candidates.tiles:
        row = {"size": size, "kernel": name, "constant": candidates.constant, "tile": list(tile), "bytes": count}
        wrong = _checked(candidates, size, tile, device)
        if wrong is None:
            telemetry = Telemetry()
            with _tile(candidates.constant, tile):
                row["ms"] = gpu_milliseconds(function, REPEATS, telemetry)
            clock = telemetry.median_clock_mhz
            row["sm_clock_mhz"] = None if math.isnan(clock) else clock
        else:
            row["error"] = wrong
        rows.append(row)
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
    results = {"copy_bytes_per_second": bandwidth, "calls": REPEATS, "sequences": SIZES, "seq_len": SEQ, "rows": rows}
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
        parts.append(f"{'x'.join(map(str, row['tile']))} {result}")
    return f"{rows[0]['size']:>5} {rows[0]['kernel']:<34} " + " | ".join(parts)


if __name__ == "__main__":
    run_app(app)
