"""Small, plausible records, so that everything right of a run record is tested without training.

Losses follow a made-up scaling law with a little noise, the same arithmetic for every call: a test
that changes one argument sees only what depends on it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from fp8lab import flops, records
from fp8lab.config import ModelConfig, OptimizerConfig, Recipe, RunConfig, parameter_count
from fp8lab.records import (
    DataRecord,
    DomainLoss,
    FinalLosses,
    Flops,
    Provenance,
    Speed,
    SpeedRecord,
    Stability,
    TrainRecord,
)

DOMAINS = {"prose": 0.65, "python": 0.15, "c": 0.10, "science": 0.10}
SIZES = (
    ModelConfig(name="0.4M", d_model=64, n_layers=4, n_heads=2, d_ff=192, vocab_size=2048, seq_len=256),
    ModelConfig(name="0.9M", d_model=112, n_layers=4, n_heads=2, d_ff=320, vocab_size=2048, seq_len=256),
    ModelConfig(name="2.2M", d_model=176, n_layers=5, n_heads=2, d_ff=480, vocab_size=2048, seq_len=256),
)
STEPS = 60
RECIPE_GAP: dict[str, float] = {
    "bf16": 0.0,
    "tensorwise": 0.006,
    "rowwise": 0.004,
    "rowwise_with_gw_hp": 0.002,
    "fused": 0.003,
}


def provenance(device_name: str = "CPU (2 cores)") -> Provenance:
    """Where a fixture claims to have run."""
    return Provenance(
        git_commit="0" * 40,
        git_dirty=False,
        started_utc="2026-01-02T03:04:05+00:00",
        ended_utc="2026-01-02T03:05:05+00:00",
        command="fp8lab run runs/plans/demo.yaml",
        device_name=device_name,
        device_count=1,
        host_count=1,
        versions={"python": "3.11.2", "torch": "2.13.0", "torchao": "0.18.0"},
        data_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
        epochs={domain: 0.5 for domain in DOMAINS},
    )


def write_demo_records(
    records_dir: Path,
    *,
    loss_shift: float = 0.0,
    token_factor: float = 1.0,
    score_shift: float = 0.0,
    seeds: tuple[int, ...] = (1,),
) -> None:
    """The demo plan's eight runs (at one seed) and its data record.

    Args:
        loss_shift: added to every loss, twice in FP8.
        token_factor: multiplies the tokens of every run.
        score_shift: added to every accuracy.
        seeds: one set of runs for each.
    """
    for seed in seeds:
        for model in SIZES:
            recipes: list[Recipe] = ["bf16", "tensorwise"]
            if model is SIZES[0]:
                recipes += ["rowwise", "rowwise_with_gw_hp"]
            for recipe in recipes:
                write_run(
                    records_dir,
                    "demo",
                    model,
                    recipe,
                    seed=seed,
                    loss_shift=loss_shift * (1 if recipe == "bf16" else 2),
                    token_factor=token_factor,
                    score_shift=score_shift,
                )
    write_data_record(records_dir, token_factor=token_factor)


def write_run(
    records_dir: Path,
    plan: str,
    model: ModelConfig,
    recipe: Recipe,
    *,
    seed: int = 1,
    loss_shift: float = 0.0,
    token_factor: float = 1.0,
    score_shift: float = 0.0,
    device_name: str = "CPU (2 cores)",
) -> Path:
    """One finished training run with its tables and scores."""
    on_cpu = device_name.startswith("CPU")
    global_batch_tokens = 8 * model.seq_len
    tokens = int(2 * parameter_count(model) * token_factor)
    config = RunConfig(
        plan=plan,
        run=f"{model.name}-{recipe}-s{seed}",
        model=model,
        recipe=recipe,
        seed=seed,
        mixture="demo",
        tokens=tokens,
        global_batch_tokens=global_batch_tokens,
        micro_batch=8,
        optimizer=OptimizerConfig(peak_learning_rate=3e-3),
    )
    metrics = _metrics(config, loss_shift)
    validation = _validation(config, loss_shift)
    last = validation[validation["step"] == STEPS].set_index("domain")
    by_domain = {
        domain: DomainLoss(loss=float(last.loss[domain]), bits_per_byte=float(last.bits_per_byte[domain]))
        for domain in DOMAINS
    }
    started = records.started(config, provenance(device_name), emulated=recipe != "bf16" and on_cpu)
    record: TrainRecord = started.model_copy(
        update={
            "status": "finished",
            "tokens": tokens,
            "steps": STEPS,
            "flops": Flops(**flops.flops_record(model, tokens)),
            "final": FinalLosses(
                train_loss=float(metrics["loss"].tail(20).mean()),
                validation_loss=sum(weight * by_domain[domain].loss for domain, weight in DOMAINS.items()),
                bits_per_byte=sum(weight * by_domain[domain].bits_per_byte for domain, weight in DOMAINS.items()),
                by_domain=by_domain,
            ),
            "stability": Stability(spike_score=0.0, skipped_steps=0, first_bad_step=None, first_bad_layer=None),
            "speed": Speed(
                tokens_per_second_median=9000.0,
                tokens_per_second_end_to_end=8000.0,
                bf16_mfu=None if on_cpu else 0.4,
                peak_memory_bytes=None if on_cpu else 20 * 2**30,
                wall_seconds=tokens / 8000,
            ),
            "conversion": _conversion(model, recipe),
            "samples": ["The tensor is scaled by the largest value of each row."],
        }
    )
    folder = records.write(record, records_dir)
    records.write_table(folder, "metrics", metrics)
    records.write_table(folder, "validation", validation)
    (folder / "eval.json").write_text(json.dumps(evaluation(config, score_shift)))
    return folder


def _final_loss(config: RunConfig) -> float:
    """A made-up law of size and tokens, the recipe's gap, and noise of the seed and recipe."""
    n, d = parameter_count(config.model), config.tokens
    noise = np.random.default_rng([config.seed, len(config.recipe), config.model.d_model]).normal(0, 0.003)
    return 1.8 + 70 / n**0.3 + 90 / d**0.3 + RECIPE_GAP[config.recipe] + float(noise)


def _metrics(config: RunConfig, loss_shift: float) -> pd.DataFrame:
    steps = np.arange(1, STEPS + 1)
    final, first = _final_loss(config), math.log(config.model.vocab_size)
    rng = np.random.default_rng(config.seed)
    loss = final + (first - final) * np.exp(-steps / 12) + rng.normal(0, 0.02, STEPS)
    loss += 0.002 * np.random.default_rng(len(config.recipe)).normal(size=STEPS) + loss_shift
    return pd.DataFrame(
        {
            "step": steps,
            "tokens": (steps * config.tokens / STEPS).astype(int),
            "loss": loss,
            "lr": 3e-3 * (1 - steps / (STEPS + 1)),
            "grad_norm": 0.5 + 2 * np.exp(-steps / 6) + 0.1 * rng.random(STEPS),
            "step_ms": 200.0,
            "tokens_per_s": 9000.0,
            "skipped": False,
        }
    )


def _validation(config: RunConfig, loss_shift: float) -> pd.DataFrame:
    offsets = {"prose": 0.10, "python": -0.15, "c": -0.25, "science": 0.05}
    first = math.log(config.model.vocab_size)
    rows = []
    for step in (STEPS // 2, STEPS):
        mean = _final_loss(config) + loss_shift
        mean += (first - mean) * math.exp(-step / 12)
        for domain, offset in offsets.items():
            loss = mean + offset
            rows.append((step, step * config.tokens // STEPS, domain, loss, loss / math.log(2) / 3.1))
    return pd.DataFrame(rows, columns=["step", "tokens", "domain", "loss", "bits_per_byte"])


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


def evaluation(config: RunConfig, score_shift: float = 0.0) -> dict[str, object]:
    """Scores in the shape of lm-eval's own result dictionary."""
    gain = 0.02 * math.log2(config.model.d_model / 32) + score_shift
    results: dict[str, dict[str, object]] = {
        "demo_perplexity": {
            "alias": "demo_perplexity",
            "word_perplexity,none": math.exp(_final_loss(config) * 1.6),
            "word_perplexity_stderr,none": "N/A",
            "bits_per_byte,none": _final_loss(config) / math.log(2) / 3.1,
            "bits_per_byte_stderr,none": "N/A",
        }
    }
    guesses = {"demo_choice": 0.25, "demo_boolean": 0.5, "demo_physical": 0.5}
    counts = {"demo_perplexity": 24} | dict.fromkeys(guesses, 40)
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
        "config": {"model": "fp8lab", "limit": None},
    }


def write_data_record(records_dir: Path, *, token_factor: float = 1.0) -> Path:
    """What the data build of a four-domain mixture reports: its manifest and the mixture."""
    domains = {
        domain: {
            "source": {"kind": "installed", "collection": domain},
            "removed": {"unreadable": 0, "empty": 3, "exact_duplicate": 12, "near_duplicate": 30, "contaminated": 0},
            "train": {
                "documents": 1000 * (index + 1),
                "tokens": int(8e6 * weight * token_factor),
                "text_bytes": int(26e6 * weight),
            },
            "validation": {"documents": 90, "tokens": 120_000, "text_bytes": 390_000},
        }
        for index, (domain, weight) in enumerate(DOMAINS.items())
    }
    record = DataRecord(
        plan="data",
        run="demo",
        status="finished",
        provenance=provenance(),
        results={
            "decontamination": None,
            "domains": domains,
        },
        config={"name": "demo", "domains": {domain: {"weight": weight} for domain, weight in DOMAINS.items()}},
    )
    return records.write(record, records_dir)


def write_speed_records(records_dir: Path, occasion: str = "2026-01-02-a", *, factor: float = 1.0) -> Path:
    """One occasion of timed steps on a GPU: three sizes, five contestants, alternating with BF16.

    Args:
        factor: multiplies FP8's times and memory.
    """
    rng = np.random.default_rng(7)
    bf16_ms = {"125M": (1024, 64, 122.0), "350M": (1024, 32, 166.0), "1.5B": (2048, 16, 609.0)}
    ratios = {
        ("bf16", "bf16"): 1.0,
        ("tensorwise", "bf16"): 1.2,
        ("rowwise", "bf16"): 0.95,
        ("fused", "bf16"): 1.45,
        ("fused", "fp8"): 1.5,
    }
    shrink = {"125M": 0.3, "350M": 0.6, "1.5B": 1.0}
    rows = []
    for model, (seq_len, micro_batch, milliseconds) in bf16_ms.items():
        for round_ in range(3):
            for (recipe, head), ratio in ratios.items():
                fp8_factor = 1.0 if recipe == "bf16" else factor
                step_ms = milliseconds / (1 + (ratio - 1) * shrink[model]) * fp8_factor
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
                            "peak_memory_bytes": int(
                                (88 if recipe == "bf16" else 69) * 2**30 * shrink[model] * fp8_factor
                            ),
                            "sm_clock_mhz": 1800.0,
                            "power_w": 690.0,
                        }
                    )
    categories = ("gemm", "attention", "casts and elementwise", "optimizer", "other")
    profiles = {"bf16": (437.0, 65.0, 84.0, 14.0, 10.0), "tensorwise": (229.0, 60.0, 195.0 * factor, 13.0, 10.0)}
    contestants = {
        name: {"profile": {"ms_by_category": dict(zip(categories, milliseconds, strict=True))}}
        for name, milliseconds in profiles.items()
    }
    record = SpeedRecord(
        plan="speed-h200",
        run=occasion,
        status="finished",
        provenance=provenance("NVIDIA H200"),
        results={"tokens": "random", "emulated": False, "cases": {"1.5B-T2048-B16": {"contestants": contestants}}},
        config={},
    )
    folder = records.write(record, records_dir)
    records.write_table(folder, "steps", pd.DataFrame(rows))
    return folder
