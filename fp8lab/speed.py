"""Speed: whole optimizer steps of several recipes, alternating in one process.

A GPU's clock drifts with its temperature and power, and two processes never meet the same one. So the
contestants of a case take turns (A B A B ...), a few steps each, and a ratio is formed within a round. They
share one set of master weights and one optimizer: only what a recipe adds is in memory twice.

A timed step is the trainer's: forward under BF16 autocast, backward, global gradient norm, fused AdamW with
clipping, FP32 master weights. Before the rounds, every contestant trains from the same initial weights on
the same batches; these warm-up losses show whether it learns as BF16 does, and compilation ends there. Each
case also gets a profile of one step by category, and the time of its GEMMs alone, in BF16 and FP8: the
speed of a recipe whose casts cost nothing.

Peers are other projects' FP8 (Transformer Engine, nanochat), swapped into the same model by a module in
``runs/peers/``. Such a module is loaded only when a plan names its recipe.

A record is called an occasion. A time budget ends one after a whole round; measuring the same occasion
again goes on with the cases that are missing.

On a CPU the same plan runs emulated, to test this code: those times say nothing about FP8.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from fp8lab import flops, records
from fp8lab.config import MODELS, Config, Head, ModelConfig, Name, Recipe, read_yaml, validate
from fp8lab.cpu import bf16_autocast
from fp8lab.data import Loader, TokenDataset, load_mixture
from fp8lab.errors import UserError
from fp8lab.kernels import end_step
from fp8lab.loss import training_loss
from fp8lab.model import GPT
from fp8lab.precision import convert, fp8_tensor_cores, uses_fp8
from fp8lab.records import SpeedRecord
from fp8lab.session import compile_blocks, device_name, training_device
from fp8lab.timing import Telemetry, gpu_milliseconds

GRADIENT_CLIP = 1.0
DISTINCT_BATCHES = 4
SETTLING_STEPS = 2
"""Untimed steps after a change of contestant: the allocator's cache fills again."""
PROFILED_STEPS = 2
GEMM_REPEATS = 10
TELEMETRY_SECONDS = 0.02
"""Between readings of clock and power."""
MINIMUM_ROUNDS = 2


PEERS = {
    "te_bf16": "te_adapter",
    "te_current": "te_adapter",
    "te_delayed": "te_adapter",
    "nanochat": "nanochat_adapter",
}
"""Names of peers in plans and records, and the module in ``runs/peers/`` that converts a model to each."""
PEERS_DIR = Path(__file__).parents[1] / "runs" / "peers"


def _named_model(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in MODELS:
        raise ValueError(f"no model {value!r}; known: {', '.join(MODELS)}")
    return MODELS[value]


class Contestant(Config):
    """One recipe in the comparison."""

    recipe: Recipe | Literal["tensorwise_fast", "te_bf16", "te_current", "te_delayed", "nanochat"]
    """A recipe of `fp8lab.precision`; tensorwise with fast accumulation in all three GEMMs; or one of `PEERS`."""
    head: Head = "bf16"
    """Precision of the output head's GEMMs."""

    @property
    def name(self) -> str:
        return self.recipe + ("-head_fp8" if self.head == "fp8" else "")


class SpeedCase(Config):
    """One model and batch, and who runs it."""

    model: Annotated[ModelConfig, BeforeValidator(_named_model)]
    """A named size, or dimensions of one's own."""
    seq_len: int | None = Field(default=None, gt=0)
    """Context length in tokens; the model's own if left out."""
    micro_batch: int = Field(gt=0)
    """Sequences a step."""
    mixture: str | None = None
    """Mixture whose training tokens are used, in place of the plan's: one whose vocabulary is the model's."""
    contestants: tuple[Contestant, ...] = Field(min_length=1)
    """In the order in which they take turns; ratios are to BF16."""

    @property
    def sized_model(self) -> ModelConfig:
        return self.model.model_copy(update={"seq_len": self.seq_len or self.model.seq_len})

    @property
    def name(self) -> str:
        return f"{self.model.name}-T{self.sized_model.seq_len}-B{self.micro_batch}"

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.sized_model.seq_len * self.micro_batch


class SpeedPlan(Config):
    """What to time."""

    name: Name
    description: str
    mixture: str | None = None
    """Mixture whose training tokens are used; random ids if left out, or where its vocabulary exceeds the model's."""
    cases: tuple[SpeedCase, ...] = Field(min_length=1)
    """In order of importance: a time budget cuts the last."""
    rounds: int = Field(default=6, gt=0)
    """Turns of each contestant."""
    steps_per_round: int = Field(default=5, gt=0)
    """Timed steps a turn."""
    heat_up_seconds: float = Field(default=0.0, ge=0)
    """Untimed turns before the first round: at its power limit a GPU lowers its clock for a while."""
    warmup_steps: int = Field(default=10, gt=0)
    """Steps from the initial weights, untimed, whose losses are recorded."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Constant."""
    compile: bool = True
    """torch.compile what is not compiled already: the blocks of other recipes than fused, and the last norm."""
    seed: int = 1
    """Of the weights, and of the random ids."""

    @property
    def mixtures(self) -> list[str]:
        """The mixtures that the cases use, each once."""
        names = [case.mixture or self.mixture for case in self.cases]
        return list(dict.fromkeys(name for name in names if name is not None))


def load_speed_plan(path: Path) -> SpeedPlan:
    """Read a speed plan.

    Raises:
        UserError: any mistake in the file, naming the field.
    """
    return validate(SpeedPlan, read_yaml(path), str(path))


def measure(
    plan: SpeedPlan,
    *,
    records_dir: Path,
    data_dir: Path,
    occasion: str | None = None,
    budget_seconds: float | None = None,
    on_case: Callable[[int, str], None] = lambda _, line: print(line, flush=True),
) -> SpeedRecord:
    """Run the cases of `plan` that fit into the budget; the record is written after each.

    Args:
        occasion: name of the record; the UTC time if None. Of one that exists, the missing cases are measured.
        budget_seconds: stop starting rounds and cases after this long.
        on_case: called with the number of cases done and a line about the last.

    Returns:
        The record; its status is 'interrupted' where the budget cut cases. A case that fails is in it with its error.

    Raises:
        UserError: the occasion exists with another plan.
    """
    device = training_device()
    deadline = time.monotonic() + (budget_seconds or float("inf"))
    batches, source = _batch_source(plan, data_dir)
    record, rows = _occasion(plan, records_dir, occasion or new_occasion(), source, device)
    cases = record.results["cases"]
    for case in plan.cases:
        if case.name in cases:
            continue
        if time.monotonic() > deadline:
            break
        try:
            cases[case.name], case_rows = _Measurement(plan, case, device, batches, deadline).run()
        except (RuntimeError, UserError) as error:
            cases[case.name], case_rows = {"error": _one_line(error), "traceback": traceback.format_exc()}, []
        _release(device)
        rows.extend(case_rows)
        _write(record, rows, records_dir)
        on_case(len(cases), _summary(case.name, cases[case.name], emulated=record.results["emulated"]))
    complete = len(cases) == len(plan.cases)
    record.status = "finished" if complete else "interrupted"
    record.reason = None if complete else "the time budget ended before the last case"
    _write(record, rows, records_dir)
    return record


def new_occasion() -> str:
    """A name for a record that begins now: the UTC time."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _occasion(
    plan: SpeedPlan, records_dir: Path, occasion: str, source: str, device: torch.device
) -> tuple[SpeedRecord, list[dict[str, Any]]]:
    """A new record, or an old one without its failed cases; and its timed steps."""
    config = plan.model_dump(mode="json")
    record = SpeedRecord(
        plan=plan.name,
        run=occasion,
        status="running",
        provenance=records.collect_provenance(device_name(device)),
        results={"tokens": source, "emulated": not fp8_tensor_cores(), "cases": {}},
        config=config,
    )
    folder = records.record_dir(records_dir, plan.name, occasion)
    if not (folder / "record.json").exists():
        return record, []
    old = records.read(folder)
    assert isinstance(old, SpeedRecord)
    if old.config != config or old.provenance.device_name != record.provenance.device_name:
        raise UserError(f"{folder}: measured with another plan or device; choose another occasion")
    cases = old.results["cases"]
    record.results["cases"] = {name: results for name, results in cases.items() if "error" not in results}
    steps = records.read_table(folder, "steps")
    return record, [{str(key): value for key, value in row.items()} for row in steps.to_dict("records")]


def _write(record: SpeedRecord, rows: list[dict[str, Any]], records_dir: Path) -> None:
    record.provenance.ended_utc = records.utc_now()
    folder = records.write(record, records_dir)
    records.write_table(folder, "steps", pd.DataFrame(rows, columns=list(records.COLUMNS["steps"])))


def summary(record: SpeedRecord) -> list[str]:
    """A line a case: each contestant's step time and, unless emulated, tokens/s and ratio to BF16."""
    emulated = record.results["emulated"]
    return [_summary(name, results, emulated=emulated) for name, results in record.results["cases"].items()]


def _summary(name: str, results: dict[str, Any], *, emulated: bool) -> str:
    if "error" in results:
        return f"{name}: {results['error']}"
    contestants = results["contestants"]
    baseline = contestants.get("bf16", {}).get("step_ms_median")
    parts = ["emulated, no measure of FP8"] if emulated else []
    parts += [f"{left_out}: {failure['error']}" for left_out, failure in results["errors"].items()]
    for contestant, measured in contestants.items():
        step_ms = measured["step_ms_median"]
        ratio = f", {baseline / step_ms:.3f}x" if baseline else ""
        speed = "" if emulated else f" ({measured['tokens_per_second']:,.0f} tokens/s{ratio})"
        parts.append(f"{contestant} {step_ms:.1f} ms{speed}")
    return f"{name}: " + "; ".join(parts)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


Batches = Callable[[SpeedCase], list[Tensor]]


def _batch_source(plan: SpeedPlan, data_dir: Path) -> tuple[Batches, str]:
    """A function from a case to its batches (micro_batch, seq_len + 1), and what the record calls their tokens."""
    datasets = {name: TokenDataset.open(load_mixture(name), data_dir) for name in plan.mixtures}
    if not datasets:
        return lambda case: _random_batches(case, plan.seed), "random ids"

    def from_data(case: SpeedCase) -> list[Tensor]:
        model, name = case.sized_model, case.mixture or plan.mixture
        if name is None or datasets[name].encoding.n_vocab > model.vocab_size:
            return _random_batches(case, plan.seed)
        loader = Loader(datasets[name], seq_len=model.seq_len, seed=plan.seed, global_batch_sequences=case.micro_batch)
        return [torch.from_numpy(loader.batch(step)) for step in range(DISTINCT_BATCHES)]

    used = ", ".join(f"{name} ({dataset.sha256[:12]})" for name, dataset in datasets.items())
    return from_data, f"mixture {used}; random ids where its vocabulary does not fit"


def _random_batches(case: SpeedCase, seed: int) -> list[Tensor]:
    model = case.sized_model
    generator = torch.Generator().manual_seed(seed)
    shape = (case.micro_batch, model.seq_len + 1)
    return [torch.randint(model.vocab_size, shape, generator=generator) for _ in range(DISTINCT_BATCHES)]


def optimizer_step(model: GPT, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """The bare step: forward, backward, gradient norm, clipping, fused AdamW, and nothing that a trainer adds.

    Args:
        model: converted and compiled.
        optimizer: fused AdamW over its parameters.
        tokens: (micro_batch, seq_len + 1), on the device.

    Returns:
        The loss, on the device.
    """
    with bf16_autocast(tokens.device):
        objective, loss = training_loss(model, model.hidden(tokens[:, :-1]), tokens[:, 1:])
    objective.backward()
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    norm = torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    )
    optimizer.grad_scale = (norm / GRADIENT_CLIP).clamp(min=1.0)  # type: ignore[attr-defined]
    skip = ~torch.isfinite(norm)
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    end_step(model, skip)
    return loss


@dataclass
class _Entrant:
    """A contestant with its model."""

    contestant: Contestant
    model: GPT
    first_step_seconds: float = 0.0
    warmup_losses: list[float] = field(default_factory=list)


class _Measurement:
    """One case, from building the models to its rows."""

    def __init__(
        self, plan: SpeedPlan, case: SpeedCase, device: torch.device, batches: Batches, deadline: float
    ) -> None:
        self._plan, self._case, self._device, self._deadline = plan, case, device, deadline
        self._batches = [batch.to(device) for batch in batches(case)]
        # Recompiling for each recipe and case must not run into dynamo's limit, after which it runs eagerly.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        self._weights = _initialised(case.sized_model, plan.seed, device)
        parameters = list(self._weights.parameters())
        self._optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
        self._results: dict[str, Any] = {"errors": {}, "contestants": {}}

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The case's results, and a row a timed step."""
        entrants = self._warm_up()
        rows = self._rounds(entrants)
        for entrant in entrants:
            self._results["contestants"][entrant.contestant.name] = {
                "first_step_seconds": entrant.first_step_seconds,
                "warmup_losses": entrant.warmup_losses,
                **self._speed(entrant, rows),
                "profile": self._profile(entrant),
            }
        if self._device.type == "cuda":
            _release(self._device)
            self._results["gemms"] = gemm_times(self._case.sized_model, self._case.tokens)
        return self._results, rows

    def _warm_up(self) -> list[_Entrant]:
        """Every contestant, compiled and warm; one that cannot run is left out, with its error in the results."""
        initial = [parameter.detach().clone() for parameter in self._weights.parameters()]
        entrants = []
        for contestant in self._case.contestants:
            with torch.no_grad():
                torch._foreach_copy_(list(self._weights.parameters()), initial)
            self._optimizer.state.clear()
            _release(self._device)
            try:
                entrant = _Entrant(contestant, self._build(contestant))
                began = time.perf_counter()
                losses = [self._step(entrant.model, 0)]
                self._synchronise()
                entrant.first_step_seconds = time.perf_counter() - began
                losses += [self._step(entrant.model, index) for index in range(1, self._plan.warmup_steps)]
                entrant.warmup_losses = [loss.item() for loss in losses]
                entrants.append(entrant)
            except Exception as error:
                # A contestant may be another project's code, and whatever it raises must not end the others' turns.
                self._results["errors"][contestant.name] = {
                    "error": _one_line(error),
                    "traceback": traceback.format_exc(),
                }
                self._optimizer.zero_grad(set_to_none=True)
        return entrants

    def _build(self, contestant: Contestant) -> GPT:
        model = _sharing_weights(self._weights)
        if contestant.recipe == "tensorwise_fast":
            _convert_tensorwise_fast(model)
        elif contestant.recipe in PEERS:
            peer = load_peer(contestant.recipe)
            peer.convert(model, contestant.recipe)
            self._results.setdefault("peers", {})[contestant.recipe] = peer.version()
        else:
            convert(model, contestant.recipe, contestant.head)  # type: ignore[arg-type]
        if self._plan.compile:
            compile_blocks(model, self._device)
        return model

    def _step(self, model: GPT, index: int) -> Tensor:
        """One optimizer step; returns its loss, on the device."""
        return optimizer_step(model, self._optimizer, self._batches[index % len(self._batches)])

    def _rounds(self, entrants: list[_Entrant]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        heated = time.monotonic() + self._plan.heat_up_seconds
        while time.monotonic() < heated:
            for entrant in entrants:
                self._turn(entrant, 0)
        for turn in range(self._plan.rounds):
            if turn >= MINIMUM_ROUNDS and time.monotonic() > self._deadline:
                break
            for entrant in entrants:
                rows.extend(self._turn(entrant, turn))
        return rows

    def _turn(self, entrant: _Entrant, turn: int) -> list[dict[str, Any]]:
        """The timed steps of one contestant's turn."""
        _release(self._device)
        on_gpu = self._device.type == "cuda"
        for index in range(SETTLING_STEPS):
            self._step(entrant.model, index)
        self._synchronise()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        telemetry = Telemetry()
        milliseconds = self._timed(entrant.model, self._plan.steps_per_round, telemetry)
        model = self._case.sized_model
        return [
            {
                "model": model.name,
                "seq_len": model.seq_len,
                "micro_batch": self._case.micro_batch,
                "recipe": entrant.contestant.recipe,
                "head": entrant.contestant.head,
                "round": turn,
                "step": step,
                "step_ms": step_ms,
                "tokens": self._case.tokens,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
                "sm_clock_mhz": telemetry.median_clock_mhz,
                "power_w": telemetry.median_power_w,
            }
            for step, step_ms in enumerate(milliseconds)
        ]

    def _timed(self, model: GPT, steps: int, telemetry: Telemetry) -> list[float]:
        """Milliseconds of each of `steps` steps; the host runs ahead, as in training, then reads the GPU's state."""
        if self._device.type != "cuda":
            times = [time.perf_counter()]
            for index in range(steps):
                self._step(model, index)
                times.append(time.perf_counter())
            return [(end - start) * 1e3 for start, end in itertools.pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for index in range(steps):
            self._step(model, index)
            events[index + 1].record()
        while not events[-1].query():
            telemetry.read()
            time.sleep(TELEMETRY_SECONDS)
        self._synchronise()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    def _speed(self, entrant: _Entrant, rows: list[dict[str, Any]]) -> dict[str, Any]:
        contestant, model = entrant.contestant, self._case.sized_model
        own = [row for row in rows if (row["recipe"], row["head"]) == (contestant.recipe, contestant.head)]
        step_ms = statistics.median(row["step_ms"] for row in own)
        per_second = self._case.tokens / step_ms * 1e3
        on_gpu = self._device.type == "cuda"
        return {
            "step_ms_median": step_ms,
            "tokens_per_second": per_second,
            "bf16_mfu": flops.bf16_mfu(model, per_second) if on_gpu else None,
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in own) if on_gpu else None,
            "fp8": contestant.recipe != "te_bf16" and uses_fp8(contestant.recipe, contestant.head),  # type: ignore[arg-type]
        }

    def _profile(self, entrant: _Entrant) -> dict[str, Any] | None:
        """Milliseconds a step by category, and of the longest kernels; None on a CPU."""
        if self._device.type != "cuda":
            return None
        _release(self._device)
        self._step(entrant.model, 0)
        self._synchronise()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for index in range(PROFILED_STEPS):
                self._step(entrant.model, index)
            self._synchronise()
        kernels: dict[str, float] = {}
        calls: dict[str, int] = {}
        for event in profiler.events():
            # Annotated regions are reported beside the kernels in them.
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                kernels[event.name] = kernels.get(event.name, 0.0) + event.device_time / 1e3 / PROFILED_STEPS
                calls[event.name] = calls.get(event.name, 0) + 1
        categories = dict.fromkeys(("gemm", "attention", "casts and elementwise", "optimizer", "other"), 0.0)
        for name, milliseconds in kernels.items():
            categories[kernel_category(name)] += milliseconds
        longest = sorted(kernels, key=lambda name: -kernels[name])[:40]
        return {
            "ms_by_category": categories,
            "longest": [
                {"kernel": name[:160], "ms": kernels[name], "calls": calls[name] / PROFILED_STEPS} for name in longest
            ],
        }

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def kernel_category(name: str) -> str:
    """Which part of a step a CUDA kernel belongs to, by its name."""
    lower = name.lower()
    if any(part in lower for part in ("flash", "fmha", "sdpa", "mha")):
        return "attention"
    if "adam" in lower or "multi_tensor_apply" in lower:
        return "optimizer"
    if any(part in lower for part in ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk")):
        return "gemm"
    if lower.startswith(("triton_", "_")) or any(
        part in lower for part in ("elementwise", "reduce", "vectorized", "softmax", "copy", "cat", "fill")
    ):
        return "casts and elementwise"
    return "other"


def gemm_times(model: ModelConfig, tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each GEMM of a step alone, on random data, in BF16 and in FP8 with fast accumulation.

    Returns:
        For each Linear of a block, and the head: ``forward``, ``grad_input``, ``grad_weight`` and ``count``, the layers
        that have it; times keyed ``<gemm>_bf16`` and ``<gemm>_fp8``.
    """
    d, f = model.d_model, model.d_ff
    linears = {
        "qkv": (3 * d, d, model.n_layers),
        "output": (d, d, model.n_layers),
        "gate_up": (2 * f, d, model.n_layers),
        "down": (d, f, model.n_layers),
        "head": (model.vocab_size, d, 1),
    }
    times: dict[str, dict[str, float]] = {}
    for name, (out_features, in_features, count) in linears.items():
        times[name] = {"count": float(count)}
        shapes = {
            "forward": (tokens, in_features, out_features),
            "grad_input": (tokens, out_features, in_features),
            "grad_weight": (out_features, tokens, in_features),
        }
        for gemm, (m, k, n) in shapes.items():
            dtype = torch.float32 if gemm == "grad_weight" else torch.bfloat16
            times[name] |= {f"{gemm}_{key}": value for key, value in _gemm_time(m, k, n, dtype).items()}
    return times


def _gemm_time(m: int, k: int, n: int, dtype: torch.dtype) -> dict[str, float]:
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")

    def bf16() -> None:
        torch.mm(a, b.t(), out_dtype=dtype)

    def fp8() -> None:
        torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)

    return {"bf16": gpu_milliseconds(bf16, GEMM_REPEATS), "fp8": gpu_milliseconds(fp8, GEMM_REPEATS)}


def _initialised(config: ModelConfig, seed: int, device: torch.device) -> GPT:
    """A model with weights drawn on the device: drawing 1.5 billion on the CPU takes longer than timing them."""
    with device:
        model = GPT(config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            depth = (2 * config.n_layers) ** -0.5 if name.endswith(("output.weight", "down.weight")) else 1.0
            parameter.normal_(0.0, 0.02 * depth, generator=generator)
    return model


def _sharing_weights(source: GPT) -> GPT:
    """Another model over the parameters of `source`."""
    with torch.device("meta"):
        model = GPT(source.config)
    for name, parameter in source.named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameter)
    model.cos, model.sin = source.cos, source.sin
    return model


def load_peer(recipe: str) -> ModuleType:
    """The module that converts a model to a peer: ``convert(model, recipe)`` and ``version()``.

    Raises:
        UserError: it is not there: the package was installed without its repository.
    """
    path = PEERS_DIR / f"{PEERS[recipe]}.py"
    spec = importlib.util.spec_from_file_location(f"fp8lab_peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UserError(f"{path}: not found; peers are measured from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _convert_tensorwise_fast(model: GPT) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    fast = {
        name: replace(getattr(config, name), use_fast_accum=True)
        for name in ("gemm_config_output", "gemm_config_grad_input", "gemm_config_grad_weight")
    }
    config = replace(config, emulate=not fp8_tensor_cores(), **fast)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name.startswith("blocks."))


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
