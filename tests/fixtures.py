"""Small, plausible records, so that everything right of a run record is tested without training.

Losses follow a made-up scaling law with a little noise, the same arithmetic for every call: a test
that changes one argument sees only what depends on it.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from fp8lab import flops, records
from fp8lab.analysis import roofline
from fp8lab.analysis.laws import Chinchilla, JointLaw
from fp8lab.config import (
    MODELS,
    Head,
    ModelConfig,
    OptimizerConfig,
    ParentConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    parameter_count,
)
from fp8lab.records import (
    BenchmarkRecord,
    DataRecord,
    DomainLoss,
    FinalLosses,
    Flops,
    Parent,
    Provenance,
    Speed,
    SpeedRecord,
    Stability,
    TestRecord,
    TrainRecord,
    ValidationLosses,
)

DOMAINS = ("prose", "python", "c", "science")
DESIGN_LEARNING_RATE = 3e-3
"""At the smallest size. Of the variance study's designs, each after the first has half the rate of the one before."""
SIZES = (
    ModelConfig(name="0.4M", d_model=64, n_layers=4, n_heads=2, d_ff=192, vocab_size=2048, seq_len=256),
    ModelConfig(name="0.9M", d_model=112, n_layers=4, n_heads=2, d_ff=320, vocab_size=2048, seq_len=256),
    ModelConfig(name="2.2M", d_model=176, n_layers=5, n_heads=2, d_ff=480, vocab_size=2048, seq_len=256),
)
OTHER_SIZES = (
    ModelConfig(name="0.5M", d_model=80, n_layers=4, n_heads=2, d_ff=224, vocab_size=1920, seq_len=128),
    ModelConfig(name="1.1M", d_model=128, n_layers=5, n_heads=2, d_ff=352, vocab_size=1920, seq_len=128),
    ModelConfig(name="2.4M", d_model=192, n_layers=6, n_heads=2, d_ff=496, vocab_size=1920, seq_len=128),
)
STEPS = 60
SAMPLE = "The ``tensor`` is __not__ <b>scaled\n~~~~~\n> by [the] $largest$ value &amp; $x_1"
"""A model may write anything."""
GEMMS = ("forward", "grad_input", "grad_weight")
RECIPE_GAP: dict[str, float] = {
    "bf16": 0.0,
    "tensorwise": 0.024,
    "rowwise": 0.020,
    "rowwise_with_gw_hp": 0.016,
    "fused": 0.018,
}


@dataclass(frozen=True)
class Measured:
    """What the fixtures found; `OTHER` has every number different."""

    loss_shift: float = 0.0
    """Added to every loss (nats)."""
    gap_shift: float = 0.0
    """Added to every loss in FP8, on top."""
    token_factor: float = 1.0
    """Multiplies the tokens of every run and domain."""
    document_factor: int = 1
    """Multiplies the documents of every domain."""
    weights: tuple[float, ...] = (0.65, 0.15, 0.10, 0.10)
    """Of the domains."""
    gradient_factor: float = 1.0
    """Multiplies every gradient norm."""
    health_factor: float = 1.0
    """Multiplies amax, its growth, kurtosis and what rounding loses."""
    spike_score: float = 0.0
    judged_steps: int = 40
    skipped_steps: int = 1
    score_shift: float = 0.0
    """Added to every accuracy, twice in FP8."""
    items: int = 40
    """Items of a task."""
    bf16_factor: float = 1.0
    """Multiplies BF16's timed steps, kernels and memory."""
    fp8_factor: float = 1.0
    """Multiplies FP8's."""
    tokens_per_second: float = 8000.0
    """Of the training runs."""
    epochs: float = 0.5
    """How often every domain was seen."""
    scatter_factor: float = 1.0
    """Multiplies the scatter between seeds of the variance study."""
    seeds: int = 5
    """Of each cell of the variance study."""
    benchmark_rounds: int = 3
    """Timed rounds of a benchmark."""
    torchao: str = "0.18.0"
    day: str = "2026-01-02"
    hash_digit: str = "a"


DEFAULT = Measured()
OTHER = Measured(
    loss_shift=0.61,
    gap_shift=0.021,
    token_factor=1.5,
    document_factor=3,
    weights=(0.57, 0.21, 0.13, 0.09),
    gradient_factor=1.7,
    health_factor=1.37,
    spike_score=0.013,
    judged_steps=47,
    skipped_steps=2,
    score_shift=0.11,
    items=70,
    bf16_factor=1.1,
    fp8_factor=1.07,
    tokens_per_second=6100.0,
    epochs=0.7,
    scatter_factor=1.4,
    seeds=6,
    benchmark_rounds=2,
    torchao="0.17.5",
    day="2026-03-14",
    hash_digit="c",
)


def provenance(device_name: str = "CPU (2 cores)", measured: Measured = DEFAULT) -> Provenance:
    """Where a fixture claims to have run."""
    return Provenance(
        git_commit=measured.hash_digit * 40,
        git_dirty=False,
        started_utc=f"{measured.day}T03:04:05+00:00",
        ended_utc=f"{measured.day}T03:05:05+00:00",
        command="fp8lab run runs/plans/demo.yaml",
        device_name=device_name,
        device_count=1,
        host_count=1,
        versions={"python": "3.11.2", "torch": "2.13.0", "torchao": measured.torchao, records.KERNELS: "ab12"},
        data_sha256=measured.hash_digit * 64,
        tokenizer_sha256=measured.hash_digit * 64,
        epochs=dict.fromkeys(DOMAINS, measured.epochs),
    )


def write_demo_records(
    records_dir: Path,
    *,
    seeds: tuple[int, ...] = (1,),
    sizes: tuple[ModelConfig, ...] = SIZES,
    measured: Measured = DEFAULT,
) -> None:
    """The demo plan's eight runs (at one seed) and its data record.

    Args:
        seeds: one set of runs for each.
        sizes: the smallest first, which is trained in every recipe.
        measured: what the runs found.
    """
    for seed in seeds:
        for model in sizes:
            recipes: list[Recipe] = ["bf16", "tensorwise"]
            if model is sizes[0]:
                recipes += ["rowwise", "rowwise_with_gw_hp"]
            for recipe in recipes:
                write_run(records_dir, "demo", model, recipe, seed=seed, measured=measured)
    write_data_record(records_dir, measured=measured)


def write_gpu_records(
    records_dir: Path, *, sizes: tuple[ModelConfig, ...] = SIZES, measured: Measured = DEFAULT
) -> None:
    """Runs on a GPU, in BF16 and two recipes: two seeds of every size."""
    for model, recipe, seed in itertools.product(sizes, ("bf16", "tensorwise", "fused"), (1, 2)):
        write_run(records_dir, "pilot-h200", model, recipe, seed=seed, measured=measured, device_name="NVIDIA H200")


def write_early_records(records_dir: Path, largest: ModelConfig = SIZES[-1], *, measured: Measured = DEFAULT) -> None:
    """The first minutes, on a GPU, of a model larger than the largest trained to an end, with either gradients."""
    name = f"{float(largest.name.removesuffix('M')) + 1:.1f}M"
    model = largest.model_copy(update={"name": name, "n_layers": largest.n_layers + 2})
    for recipe in ("bf16", "fused"):
        write_run(records_dir, "early-h200", model, recipe, measured=measured, budget=1, device_name="NVIDIA H200")
    write_early_change(records_dir, model, "e5m2", {"gradient_format": "e5m2"}, measured=measured)


def write_early_change(
    records_dir: Path,
    model: ModelConfig,
    suffix: str,
    changed: Mapping[str, Any],
    *,
    seed: int = 1,
    measured: Measured = DEFAULT,
) -> Path:
    """The first minutes of ``fused`` with other than its defaults, at a lower loss."""
    folder = write_run(
        records_dir,
        "early-gradients-h200",
        model,
        "fused",
        seed=seed,
        measured=measured,
        budget=1,
        device_name="NVIDIA H200",
    )
    record = records.read(folder)
    assert isinstance(record, TrainRecord)
    assert record.final is not None
    loss = record.final.validation_loss - 0.01 * measured.bf16_factor
    rate = record.config["optimizer"]["peak_learning_rate"]
    return _move_to_design(folder, suffix, loss, 0.0, rate, changed)


def write_scaling_out_records(
    records_dir: Path, model: ModelConfig = SIZES[-1], *, measured: Measured = DEFAULT
) -> None:
    """BF16 and ``fused`` on one GPU and two."""
    for recipe in ("bf16", "fused"):
        for count in (1, 2):
            folder = write_run(
                records_dir, "scaling-out-h200", model, recipe, measured=measured, device_name="NVIDIA H200"
            )
            record = records.read(folder)
            assert isinstance(record, TrainRecord)
            assert record.speed is not None
            assert record.speed.tokens_per_second_median is not None
            record.run = f"{record.run}-{count}gpu"
            record.provenance.device_count = count
            record.speed.tokens_per_second_median *= count * (1 if count == 1 else 0.8 * measured.bf16_factor)
            records.write(record, records_dir)
            shutil.rmtree(folder)


def write_run(
    records_dir: Path,
    plan: str,
    model: ModelConfig,
    recipe: Recipe,
    *,
    seed: int = 1,
    measured: Measured = DEFAULT,
    device_name: str = "CPU (2 cores)",
    budget: float = 2,
    branch_of: str | None = None,
    final_loss: float | None = None,
) -> Path:
    """One finished training run with its tables, and with scores and FP8 health unless its final loss is given.

    Args:
        budget: tokens a parameter, before `measured` changes them.
        branch_of: the stable run that a decay branch leaves.
        final_loss: its training loss in the end (nats); by `_final_loss` if left out. With it the record counts the
            steps that its tokens take, for laws; else those of its tables, for what is judged step by step.
    """
    on_cpu = device_name.startswith("CPU")
    fp8_factor = 1.0 if recipe == "bf16" else measured.fp8_factor
    global_batch_tokens = 8 * model.seq_len
    tokens = int(budget * parameter_count(model) * measured.token_factor)
    steps = -(-tokens // global_batch_tokens)
    config = RunConfig(
        plan=plan,
        run=f"{branch_of}-d{budget:g}" if branch_of else f"{model.name}-{recipe}-s{seed}",
        schedule=ScheduleConfig(kind="wsd", decay_fraction=0.2),
        parent=ParentConfig(run=branch_of, step=steps * 3 // 4) if branch_of else None,
        model=model,
        recipe=recipe,
        seed=seed,
        mixture="demo",
        tokens=tokens,
        global_batch_tokens=global_batch_tokens,
        micro_batch=8,
        # One rule for all sizes.
        optimizer=OptimizerConfig(peak_learning_rate=DESIGN_LEARNING_RATE * SIZES[0].d_model / model.d_model),
    )
    weights = dict(zip(DOMAINS, measured.weights, strict=True))
    loss = _final_loss(config, measured) if final_loss is None else final_loss
    metrics = _metrics(config, measured, loss)
    validation = _validation(config, loss)
    last = validation[validation["step"] == STEPS].set_index("domain")
    by_domain = {
        domain: DomainLoss(loss=float(last.loss[domain]), bits_per_byte=float(last.bits_per_byte[domain]))
        for domain in DOMAINS
    }
    started = records.started(config, provenance(device_name, measured), emulated=recipe != "bf16" and on_cpu)
    record: TrainRecord = started.model_copy(
        update={
            "status": "finished",
            "parent": Parent(**config.parent.model_dump()) if config.parent else None,
            "tokens": tokens,
            "steps": STEPS if final_loss is None else config.steps,
            "flops": Flops(**flops.flops_record(model, tokens)),
            "final": FinalLosses(
                train_loss=float(metrics["loss"].tail(20).mean()),
                validation_loss=sum(weight * by_domain[domain].loss for domain, weight in weights.items()),
                bits_per_byte=sum(weight * by_domain[domain].bits_per_byte for domain, weight in weights.items()),
                by_domain=by_domain,
            ),
            "stability": Stability(
                spike_score=measured.spike_score,
                judged_steps=measured.judged_steps,
                skipped_steps=measured.skipped_steps,
                first_bad_step=None,
                first_bad_layer=None,
                saturated_steps={"blocks.0.mlp.down input": 2 + measured.skipped_steps} if recipe == "fused" else None,
                underflowing_steps={} if recipe == "fused" else None,
            ),
            "speed": Speed(
                tokens_per_second_median=1.1 * measured.tokens_per_second / fp8_factor,
                tokens_per_second_end_to_end=measured.tokens_per_second,
                bf16_mfu=None if on_cpu else 0.4 * measured.bf16_factor,
                peak_memory_bytes=None if on_cpu else int(20 * 2**30 * measured.bf16_factor * fp8_factor),
                wall_seconds=tokens / measured.tokens_per_second,
            ),
            "conversion": _conversion(model, recipe),
            "samples": [SAMPLE],
        }
    )
    folder = records.write(record, records_dir)
    records.write_table(folder, "metrics", metrics)
    records.write_table(folder, "validation", validation)
    if final_loss is None:
        records.write_table(folder, "health", _health(config, measured))
        (folder / "eval.json").write_text(json.dumps(evaluation(config, measured)))
    return folder


LADDER = tuple(MODELS[name] for name in ("7M", "13M", "19M", "28M", "48M"))
OTHER_LADDER = tuple(
    model.model_copy(update={"name": name, "vocab_size": 9216, "n_layers": model.n_layers + more})
    for more, (model, name) in enumerate(zip(LADDER, ("7.2M", "14M", "23M", "35M", "67M"), strict=True))
)
LADDER_LAW = JointLaw(Chinchilla(E=1.25, A=120.0, B=250.0, alpha=0.29, beta=0.28), {"tensorwise": 0.93, "fused": 0.97})
"""What the fixtures' ladder obeys, up to the noise of its seeds."""
OTHER_LADDER_LAW = JointLaw(
    Chinchilla(E=1.6, A=55.0, B=480.0, alpha=0.25, beta=0.33), {"tensorwise": 0.88, "fused": 0.91}
)
SEED_NOISE = 0.005
"""Standard deviation between the ladder's seeds (nats a token)."""


def write_ladder_records(
    records_dir: Path,
    *,
    sizes: tuple[ModelConfig, ...] = LADDER,
    law: JointLaw = LADDER_LAW,
    noise: float = SEED_NOISE,
    measured: Measured = DEFAULT,
) -> None:
    """Five sizes in three precisions with branches at 5 and 10 tokens a parameter, and seeds of the smallest size."""
    rng = np.random.default_rng(len(sizes[0].name) + sizes[0].vocab_size)
    on_gpu: dict[str, Any] = {"device_name": "NVIDIA H200", "measured": measured}
    for model, recipe in itertools.product(sizes, ("bf16", *law.multipliers)):
        shared = rng.normal()
        for budget in (20, 10, 5):
            tokens = budget * parameter_count(model) * measured.token_factor
            loss = float(law(parameter_count(model), tokens, recipe)) + measured.loss_shift
            loss += noise * float(shared + rng.normal()) / math.sqrt(2)
            stable_run = None if budget == 20 else f"{model.name}-{recipe}-s1"
            write_run(
                records_dir, "ladder-h200", model, cast(Recipe, recipe),
                budget=budget, branch_of=stable_run, final_loss=loss, **on_gpu,
            )  # fmt: skip
    for recipe in ("bf16", "fused"):
        larger = MODELS["125M"]
        tokens = 5 * parameter_count(larger) * measured.token_factor
        loss = float(law(parameter_count(larger), tokens, recipe)) + measured.loss_shift
        write_run(records_dir, "125m-h200", larger, cast(Recipe, recipe), budget=5, final_loss=loss, **on_gpu)
    write_data_record(records_dir, measured=measured)
    for seed in range(1, 5):
        loss = float(law(parameter_count(sizes[0]), 20 * parameter_count(sizes[0]))) + rng.normal(0, noise)
        write_run(records_dir, "seeds-h200", sizes[0], "bf16", seed=seed, budget=20, final_loss=loss, **on_gpu)


def move_ladder_losses(records_dir: Path, loss_of: Callable[[int, float], float], recipe: str = "bf16") -> None:
    """Change the final losses of the ladder's runs by what `loss_of` parameters and tokens a parameter says."""
    for path in (records_dir / "ladder-h200").glob(f"*-{recipe}-*/record.json"):
        record = json.loads(path.read_text())
        n = parameter_count(MODELS[record["config"]["model"]["name"]])
        record["final"]["validation_loss"] += loss_of(n, record["tokens"] / n)
        path.write_text(json.dumps(record))


def _final_loss(config: RunConfig, measured: Measured) -> float:
    """A made-up law of size and tokens, the recipe's gap, and noise of the seed and recipe."""
    shift = measured.loss_shift + (0 if config.recipe == "bf16" else measured.gap_shift)
    n, d = parameter_count(config.model), config.tokens
    noise = np.random.default_rng([config.seed, len(config.recipe), config.model.d_model]).normal(0, 0.0008)
    return 1.8 + 70 / n**0.3 + 90 / d**0.3 + RECIPE_GAP[config.recipe] + float(noise) + shift


def _metrics(config: RunConfig, measured: Measured, final: float) -> pd.DataFrame:
    steps = np.arange(1, STEPS + 1)
    first = math.log(config.model.vocab_size)
    rng = np.random.default_rng(config.seed)
    loss = final + (first - final) * np.exp(-steps / 12) + rng.normal(0, 0.02, STEPS)
    loss += 0.002 * np.random.default_rng(len(config.recipe)).normal(size=STEPS)
    table = pd.DataFrame(
        {
            "step": steps,
            "tokens": (steps * config.tokens / STEPS).astype(int),
            "loss": loss,
            "lr": config.optimizer.peak_learning_rate * (1 - steps / (STEPS + 1)),
            "grad_norm": (0.5 + 2 * np.exp(-steps / 6) + 0.1 * rng.random(STEPS)) * measured.gradient_factor,
            "step_ms": 200.0 * measured.bf16_factor,
            "tokens_per_s": 9000.0 / measured.bf16_factor,
            "skipped": False,
        }
    )
    return table if config.parent is None else table[table["step"] > 3 * STEPS // 4]


def _validation(config: RunConfig, final: float) -> pd.DataFrame:
    offsets = {"prose": 0.10, "python": -0.15, "c": -0.25, "science": 0.05}
    first = math.log(config.model.vocab_size)
    rows = []
    for step in (STEPS // 4, STEPS // 2, STEPS):
        mean = final + (first - final) * math.exp(-step / 12)
        for domain, offset in offsets.items():
            loss = mean + offset
            rows.append((step, step * config.tokens // STEPS, domain, loss, loss / math.log(2) / 3.1))
    return pd.DataFrame(rows, columns=["step", "tokens", "domain", "loss", "bits_per_byte"])


LINEARS = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")


def _health(config: RunConfig, measured: Measured) -> pd.DataFrame:
    """Six measurements of every Linear; the last block's `down` has outliers that its input loses small values to."""
    factor, last = measured.health_factor, config.model.n_layers - 1
    rows = []
    for step, block, (index, linear), (operand, tensor) in itertools.product(
        range(10, STEPS + 1, 10),
        range(config.model.n_layers),
        enumerate(LINEARS, start=1),
        enumerate(("input", "weight", "grad_output")),
    ):
        outlier = linear == "mlp.down" and block == last
        amax = (8.0, 0.3, 4e-5)[operand] * index * (1 + 0.01 * step * factor * (10 if outlier else 1))
        loss = factor * index * (1 + block) * (2e-4 if outlier and tensor == "input" else 1e-6) * (1 + step / STEPS)
        rows.append(
            {
                "step": step,
                "layer": f"blocks.{block}.{linear}",
                "tensor": tensor,
                "amax": amax,
                "scale": 448 / amax / (2 ** (factor * index) if tensor == "grad_output" else 1),
                "underflow_fraction": 10 * loss,
                "saturation_fraction": 0.02 * loss if config.recipe == "fused" else 0.0,
                "sqnr_db": 31.5 - factor * 0.3 * index * (operand + 1),
                "kurtosis": 3 + factor * (50 if outlier else index) * step / STEPS if tensor == "input" else math.nan,
                "gradient_norm": factor * 0.01 * index if tensor == "weight" else math.nan,
            }
        )
    table = pd.DataFrame(rows)
    if config.recipe == "bf16":
        table[["scale", "underflow_fraction", "saturation_fraction", "sqnr_db"]] = math.nan
    return table


def _conversion(model: ModelConfig, recipe: Recipe) -> list[dict[str, str]]:
    d, ff = model.d_model, model.d_ff
    shapes = {
        "attention.qkv": (3 * d, d),
        "attention.output": (d, d),
        "mlp.gate_up": (2 * ff, d),
        "mlp.down": (d, ff),
    }
    converted = recipe != "bf16"
    rows = [
        {
            "name": f"blocks.{block}.{name}",
            "shape": f"{rows} x {columns}",
            "precision": recipe,
            "reason": "converted" if converted else "recipe bf16",
        }
        for block in range(model.n_layers)
        for name, (rows, columns) in shapes.items()
    ]
    head = {"name": "head", "shape": f"{model.vocab_size} x {d}", "precision": "bf16", "reason": "head: bf16"}
    return [*rows, head]


def evaluation(config: RunConfig, measured: Measured = DEFAULT) -> dict[str, object]:
    """Scores in the shape of lm-eval's own result dictionary."""
    gain = 0.02 * math.log2(config.model.d_model / 32) + measured.score_shift * (1 if config.recipe == "bf16" else 2)
    results: dict[str, dict[str, object]] = {
        "demo_perplexity": {
            "alias": "demo_perplexity",
            "word_perplexity,none": math.exp(_final_loss(config, measured) * 1.6),
            "word_perplexity_stderr,none": "N/A",
            "bits_per_byte,none": _final_loss(config, measured) / math.log(2) / 3.1,
            "bits_per_byte_stderr,none": "N/A",
        }
    }
    guesses = {"demo_choice": 0.25, "demo_boolean": 0.5, "demo_physical": 0.5}
    counts = {"demo_perplexity": measured.items - 16} | dict.fromkeys(guesses, measured.items)
    for task, guess in guesses.items():
        accuracy = guess + gain
        results[task] = {
            "alias": task,
            "acc,none": accuracy,
            "acc_stderr,none": math.sqrt(accuracy * (1 - accuracy) / (counts[task] - 1)),
        }
    return {
        "results": results,
        "n-samples": {task: {"original": n, "effective": n} for task, n in counts.items()},
        "versions": dict.fromkeys(counts, 1.0),
        "n-shot": dict.fromkeys(counts, 0),
        "random_guess": guesses,
        "answers": {
            task: {
                "bits_per_byte": 1.4 + guess * gain + 0.01 * len(config.recipe),
                "bits_per_byte_stderr": 0.01 / math.sqrt(counts[task]),
            }
            for task, guess in guesses.items()
        },
        "config": {"model": "fp8lab", "limit": None},
    }


def write_data_record(records_dir: Path, *, measured: Measured = DEFAULT) -> Path:
    """What the data build of a four-domain mixture reports: its manifest and the mixture."""
    domains = {
        domain: {
            "source": {"kind": "installed", "collection": domain},
            "removed": {
                "exact_duplicate": 12 * measured.document_factor,
                "near_duplicate": 30 * measured.document_factor,
                "contaminated": 0,
            },
            "train": {
                "documents": 1000 * (index + 1) * measured.document_factor,
                "tokens": int(8e6 * weight * measured.token_factor),
                "text_bytes": int(26e6 * weight),
            },
            "validation": {"documents": 90, "tokens": int(120_000 * measured.token_factor), "text_bytes": 390_000},
        }
        for index, (domain, weight) in enumerate(zip(DOMAINS, measured.weights, strict=True))
    }
    record = DataRecord(
        plan="data",
        run="demo",
        status="finished",
        provenance=provenance(measured=measured),
        results={
            "decontamination": None,
            "domains": domains,
        },
        config={
            "name": "demo",
            "domains": {domain: {"weight": weight} for domain, weight in zip(DOMAINS, measured.weights, strict=True)},
        },
    )
    return records.write(record, records_dir)


def write_benchmark_records(records_dir: Path, *, measured: Measured = DEFAULT) -> None:
    """What the benchmarks of the data path report."""
    factor = measured.token_factor

    def rounds(value: float) -> dict[str, object]:
        values = [value * factor * share for share in (0.97, 1.0, 1.02)]
        return {"median": values[1], "min": values[0], "max": values[2], "rounds": values[: measured.benchmark_rounds]}

    results: dict[str, dict[str, object]] = {
        "data-loader": {"batch_tokens": int(131_072 * factor), "tokens_per_second": rounds(18e7)},
        "data-memory": {"document_bytes": int(1e8 * factor), "peak_memory_bytes": int(1.4e9 * factor)},
        "data-tokenise": {
            "build_megabytes_per_second": rounds(30.6),
            "tiktoken_megabytes_per_second": rounds(23.7),
            "ratio": rounds(1.29),
        },
    }
    for run, result in results.items():
        record = BenchmarkRecord(
            plan="benchmarks", run=run, status="finished", provenance=provenance(measured=measured), results=result
        )
        records.write(record, records_dir)


def write_speed_records(
    records_dir: Path,
    occasion: str = "2026-01-02-a",
    *,
    trained: ModelConfig | None = None,
    measured: Measured = DEFAULT,
) -> Path:
    """One occasion of timed steps on a GPU: three sizes, five contestants, alternating with BF16.

    Args:
        trained: a fourth size, of those that were trained.
    """
    rng = np.random.default_rng(7)
    bf16_ms = {"125M": (1024, 64, 122.0), "350M": (1024, 32, 166.0), "1.5B": (2048, 16, 609.0)}
    ratios = {
        ("bf16", "bf16"): 1.0,
        ("tensorwise", "bf16"): 1.2,
        ("rowwise", "bf16"): 0.75,
        ("fused", "bf16"): 1.45,
        ("fused", "fp8"): 1.5,
    }
    shrink = {"125M": 0.3, "350M": 0.6, "1.5B": 1.0}
    if trained:
        bf16_ms[trained.name] = (trained.seq_len, 64, 60.0)
        shrink[trained.name] = 0.2
    rows = []
    for model, (seq_len, micro_batch, milliseconds) in bf16_ms.items():
        for round_ in range(3):
            for (recipe, head), ratio in ratios.items():
                factor = measured.bf16_factor if recipe == "bf16" else measured.fp8_factor
                step_ms = milliseconds / (1 + (ratio - 1) * shrink[model]) * factor
                for step in range(8):
                    rows.append(
                        {
                            "model": model,
                            "seq_len": seq_len,
                            "micro_batch": micro_batch,
                            "recipe": recipe,
                            "head": head,
                            "round": round_,
                            "step": step,
                            "step_ms": step_ms * (1 + rng.normal(0, 0.004)),
                            "tokens": seq_len * micro_batch,
                            "peak_memory_bytes": int((88 if recipe == "bf16" else 69) * 2**30 * shrink[model] * factor),
                            "sm_clock_mhz": 1800.0 / factor,
                            "power_w": 650.0 * factor,
                        }
                    )
    categories = ("gemm", "attention", "casts and elementwise", "optimizer", "other")
    profiles = {
        "bf16": (437.0, 65.0, 84.0, 14.0, 10.0),
        "tensorwise": (229.0, 60.0, 195.0, 13.0, 10.0),
    }
    contestants = {
        name: {
            "profile": {
                "ms_by_category": {
                    category: value * (measured.bf16_factor if name == "bf16" else measured.fp8_factor)
                    for category, value in zip(categories, milliseconds, strict=True)
                }
            },
            "warmup_losses": [
                start + measured.loss_shift + (measured.gap_shift + 0.02 if name != "bf16" else 0) * step
                for step, start in enumerate((11.1, 10.3, 9.6, 8.8))
            ],
        }
        for name, milliseconds in profiles.items()
    }
    gemms = {
        name: {"count": count}
        | {f"{gemm}_bf16": 2.0 * measured.bf16_factor for gemm in GEMMS}
        | {f"{gemm}_fp8": 1.0 * measured.fp8_factor for gemm in GEMMS}
        for name, count in {"qkv": 28.0, "output": 28.0, "head": 1.0}.items()
    }
    case = {
        "contestants": contestants,
        "gemms": gemms,
        "errors": {"rowwise-head_fp8": {"error": "OutOfMemoryError: tried to allocate 12 GiB", "traceback": ""}},
    }
    hour = sum(map(ord, occasion)) % 24
    when = {
        f"{end}_utc": f"{measured.day}T{hour:02}:{minute}:05+00:00"
        for end, minute in (("started", "04"), ("ended", "05"))
    }
    record = SpeedRecord(
        plan="speed-h200",
        run=occasion,
        status="finished",
        provenance=provenance("NVIDIA H200", measured).model_copy(update=when),
        results={"tokens": "random ids", "emulated": False, "cases": {"1.5B-T2048-B16": case}},
        config={"cases": [{"model": trained.model_dump()}]} if trained else {},
    )
    folder = records.write(record, records_dir)
    records.write_table(folder, "steps", pd.DataFrame(rows))
    return folder


def write_map_records(records_dir: Path, *, measured: Measured = DEFAULT) -> None:
    """The map of ratios by width, measured on both devices at every width and number of tokens.

    By its profile a GPU works through most of a step but at the fewest tokens.
    """
    for device in roofline.DEVICES:
        rows = []
        cases: dict[str, Any] = {}
        for width, tokens in itertools.product(roofline.MAP_WIDTHS, roofline.MAP_TOKENS):
            for recipe, slope in {"bf16": 0.0, "fused": 0.12, "tensorwise_fast": 0.07}.items():
                factor = measured.bf16_factor if recipe == "bf16" else measured.fp8_factor
                ratio = 1 + slope * (math.log2(width) - 9)
                step_ms, micro_batch = 1e-6 * width * tokens / ratio * factor, tokens // roofline.MAP_SEQ
                worked = step_ms / factor**2 * (0.4 if tokens == min(roofline.MAP_TOKENS) else 0.95)
                case = cases.setdefault(
                    f"w{width}-T{roofline.MAP_SEQ}-B{micro_batch}", {"contestants": {}, "errors": {}}
                )
                case["contestants"][recipe] = {
                    "step_ms_median": step_ms * 1.0015,
                    "profile": {"ms_by_category": {"gemm": worked}},
                }
                rows += [
                    {
                        "model": f"w{width}",
                        "seq_len": roofline.MAP_SEQ,
                        "micro_batch": micro_batch,
                        "recipe": recipe,
                        "head": "bf16",
                        "round": round_,
                        "step": 0,
                        "step_ms": step_ms * (1 + 0.001 * round_),
                        "tokens": tokens,
                        "peak_memory_bytes": int(width * tokens * factor),
                        "sm_clock_mhz": 1700.0 / factor,
                        "power_w": 600.0 * factor,
                    }
                    for round_ in range(4)
                ]
        record = SpeedRecord(
            plan="speed-map",
            run=device.name.lower(),
            status="finished",
            provenance=provenance(device.record_name, measured),
            results={"tokens": "random ids", "emulated": False, "cases": cases},
            config={"cases": [{"model": roofline.map_model(width).model_dump()} for width in roofline.MAP_WIDTHS]},
        )
        records.write_table(records.write(record, records_dir), "steps", pd.DataFrame(rows))


VARIANCE_DESIGNS: dict[str, tuple[float, float, float]] = {
    "base": (0.008, 0.0, 0.0),
    "low-rate": (0.004, 0.012, 0.0),
    "long-decay": (0.006, 0.004, 0.97),
}
"""Scatter between seeds (nats), loss against the first, and how far FP8's seeds move with BF16's."""


def write_variance_records(
    records_dir: Path, model: ModelConfig = SIZES[0], *, measured: Measured = DEFAULT, device_name: str = "NVIDIA H200"
) -> None:
    """The variance study: several seeds of three designs in two recipes."""
    for index, (design, (deviation, cost, move_together)) in enumerate(VARIANCE_DESIGNS.items()):
        shared = move_together**measured.scatter_factor
        for recipe in ("bf16", "fused"):
            for seed in range(11, 11 + measured.seeds):
                own, common = (
                    np.random.default_rng([seed, *map(ord, name)]).normal(0, deviation * measured.scatter_factor)
                    for name in (design + recipe, design)
                )
                shift = cost + float(shared * common + math.sqrt(1 - shared**2) * own) + RECIPE_GAP[recipe]
                shift += 0 if recipe == "bf16" else measured.gap_shift
                folder = write_run(
                    records_dir, "variance-h200", model, recipe, seed=seed, measured=measured, device_name=device_name
                )
                loss, averaging = 3 + measured.loss_shift + shift, 0.4 * float(own) - 0.001
                _move_to_design(folder, design, loss, averaging, DESIGN_LEARNING_RATE / 2**index)


NUMERICS_VARIANTS: dict[str, tuple[Recipe, Head, dict[str, Any], float]] = {
    "slow-weights": ("fused", "bf16", {"fast_accumulation": ["output", "grad_input"]}, -0.003),
    "e5m2": ("fused", "bf16", {"gradient_format": "e5m2"}, 0.004),
    "stock": ("tensorwise", "bf16", {}, 0.0),
    "head": ("fused", "fp8", {}, 0.006),
    "stock-head": ("tensorwise", "fp8", {}, 0.007),
}
"""Recipe, precision of the head, what of `fused` is changed, and what it does to the loss (nats)."""


def write_numerics_records(
    records_dir: Path, model: ModelConfig = SIZES[0], *, measured: Measured = DEFAULT, device_name: str = "NVIDIA H200"
) -> None:
    """Variants of `fused`, and torchao's recipe, in the variance study's design ``low-rate`` and on its seeds."""
    index = list(VARIANCE_DESIGNS).index("low-rate")
    for variant, (recipe, head, changed, cost) in NUMERICS_VARIANTS.items():
        for seed in range(11, 11 + measured.seeds):
            folder = write_run(
                records_dir, "numerics-h200", model, recipe, seed=seed, measured=measured, device_name=device_name
            )
            scatter = np.random.default_rng([seed, *map(ord, variant)]).normal(0, 0.004 * measured.scatter_factor)
            loss = 3.012 + measured.loss_shift + cost + RECIPE_GAP[recipe] + measured.gap_shift + float(scatter)
            _move_to_design(folder, variant, loss, -0.001, DESIGN_LEARNING_RATE / 2**index, changed, head)


def _move_to_design(
    folder: Path,
    design: str,
    loss: float,
    averaging: float,
    learning_rate: float,
    fused: Mapping[str, Any] = {},
    head: Head = "bf16",
) -> Path:
    """Make a run one of a design, which its name ends in: its own loss, learning rate, settings of `fused` and head."""
    record = records.read(folder)
    assert isinstance(record, TrainRecord)
    assert record.final is not None
    record.final = _shifted(record.final, loss, averaging)
    seed = f"-s{record.seed}"
    record.run = record.run.replace(seed, f"{'-head_fp8' if head == 'fp8' else ''}{seed}-{design}")
    record.config["optimizer"]["peak_learning_rate"] = learning_rate
    record.config["fused"] |= fused
    record.head = record.config["head"] = head
    return records.write(record, folder.rename(folder.with_name(record.run)).parents[1])


def _shifted(final: FinalLosses, loss: float, averaging: float) -> FinalLosses:
    """Losses around `loss` with an average of the weights that ends `averaging` above them."""
    by_domain = {
        domain: DomainLoss(loss=loss + offset, bits_per_byte=(loss + offset) / math.log(2) / 3.1)
        for domain, offset in zip(final.by_domain, (0.01, -0.02, 0.03, -0.04), strict=True)
    }
    plain = ValidationLosses(validation_loss=loss, bits_per_byte=loss / math.log(2) / 3.1, by_domain=by_domain)
    averaged = plain.model_copy(update={"validation_loss": loss + averaging})
    return FinalLosses(train_loss=loss, averaged=averaged, **plain.model_dump())


def write_reliability_records(records_dir: Path, *, measured: Measured = DEFAULT) -> None:
    """What the fault tests saw, and the trainer's benchmarks on a GPU."""
    steps = int(1000 * measured.token_factor)
    reports = [
        {
            "topic": "lock",
            "fault": "A second process on a run that one trains already",
            "outcome": "It is refused and changes nothing",
            "measured": {"exit_code": int(120 * measured.token_factor)},
            "test": "tests/faults/test_processes.py::test_a_second_process_is_refused",
            "passed": True,
        },
        *(
            {
                "topic": "kill",
                "fault": "`kill -9` at random moments",
                "outcome": "The same command resumes, and the run ends bit-identical",
                "measured": {"recipe": recipe, "newest_checkpoints": [steps // 4, steps // 2], "steps": steps},
                "test": f"tests/faults/test_processes.py::test_killed[{recipe}]",
                "passed": True,
            }
            for recipe in ("bf16", "fused")
        ),
    ]
    faults = TestRecord(
        plan="reliability",
        run="fault-tests",
        status="finished",
        provenance=provenance(measured=measured),
        results={"faults": reports},
    )
    records.write(faults, records_dir)
    factor = measured.fp8_factor * measured.bf16_factor
    for name, recipe, results in (
        ("overhead", "fused", _overhead(factor)),
        ("checkpoint", "bf16", _checkpoint(factor)),
        ("resume", "fused", _resume(factor, steps)),
    ):
        benchmark = BenchmarkRecord(
            plan="benchmarks",
            run=f"trainer-{name}-125M-{recipe}",
            status="finished",
            provenance=provenance("NVIDIA H200", measured),
            results={"model": "125M", "recipe": recipe, **results},
        )
        records.write(benchmark, records_dir)


def _rounds(values: Sequence[float], factor: float) -> dict[str, object]:
    scaled = [value * factor for value in values]
    return {"median": float(np.median(scaled)), "min": min(scaled), "max": max(scaled), "rounds": scaled}


def _overhead(factor: float) -> dict[str, object]:
    return {
        "bare_step_seconds": _rounds((0.12, 0.13, 0.14), factor),
        "loop_share": _rounds((0.0032, 0.0044, 0.0056), factor),
        "health_share": _rounds((0.0011, 0.0022, 0.0033), factor),
        "validation_share": _rounds((0.0041, 0.0052, 0.0063), factor),
        "overhead": _rounds((0.0084, 0.0118, 0.0152), factor),
    }


def _checkpoint(factor: float) -> dict[str, object]:
    return {
        "checkpoint_bytes": int(1.49e9 * factor),
        "write_seconds": _rounds((2.1, 2.3, 2.6), factor),
        "stall_seconds": _rounds((0.041, 0.052, 0.063), factor),
        "lost_seconds": _rounds((0.11, 0.13, 0.17), factor),
        "save_every": int(500 * factor),
        "cost": _rounds((0.0018, 0.0022, 0.0028), factor),
    }


def _resume(factor: float, steps: int) -> dict[str, object]:
    compared = {
        "weights_identical": False,
        "equal_weights_share": 0.312 * factor,
        "largest_weight_difference": 0.0123 * factor,
        "curve_identical": False,
        "first_different_step": steps // 3,
        "largest_loss_difference": 0.0345 * factor,
        "validation_loss_difference": -0.0012 * factor,
    }
    return {"steps": steps, "killed_after_checkpoint": steps // 2, "control": compared, "resumed": compared}
