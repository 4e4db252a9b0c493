"""What was run and what is planned, for reading: models, precisions, conventions, cost."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fp8lab import estimate, flops
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.analysis.starts import Start
from fp8lab.config import ModelConfig, Recipe, parameter_count
from fp8lab.plan import Plan
from fp8lab.units import number, scientific, signed, unique


def run_table(runs: RunSet) -> pd.DataFrame:
    """One row a run: what it was and how it ended."""
    rows = [
        {
            "model": run.size,
            "recipe": run.recipe,
            "seed": run.record.seed,
            "tokens": number(run.record.tokens),
            "tokens / N": f"{run.record.tokens / run.parameters:.1f}",
            "compute (FLOPs)": scientific(run.record.flops.total),
            "validation loss (nats/token)": f"{run.validation_loss:.4f}",
            "bits/byte": f"{run.bits_per_byte:.4f}",
        }
        for run in runs.runs
    ]
    return pd.DataFrame(rows)


def parameter_conventions(runs: RunSet) -> pd.DataFrame:
    """Parameters and training FLOPs a token of each model, by convention, and the share of GEMM FLOPs in FP8."""
    rows = []
    for size in runs.sizes:
        record = runs.where(size=size)[0].record
        row = {
            "model": size,
            "layers × width": f"{record.model.n_layers} × {record.model.d_model}",
            "N, total": number(record.parameters.total),
            "non-embedding": number(record.parameters.non_embedding),
            "6·N": scientific(record.flops.per_token_6n),
            "6·N_matmul + 12·L·d·T": scientific(record.flops.per_token_matmul_attention),
            "6·N_matmul + 6·L·d·T": scientific(record.flops.per_token_matmul_attention_causal),
        }
        rows.append(row | {f"in FP8, {recipe}": _fp8_share(runs, size, recipe) for recipe in _fp8_recipes(runs)})
    return pd.DataFrame(rows)


def starts(compared: Sequence[Start]) -> pd.DataFrame:
    """The first minutes of larger models: a row a run, those in FP8 below the BF16 runs that they stand beside.

    Loss is validation's in the end, speed the median of the run's steps, memory the peak; in brackets over BF16's.
    """
    rows = []
    for size in unique(start.size for start in compared):
        at_size = [start for start in compared if start.size == size]
        baselines = {start.baseline.record.seed: start.baseline for start in at_size}
        rows += [_start_row(baselines[seed]) for seed in sorted(baselines)]
        for start in at_size:
            row = _start_row(start.ours) | {"− BF16": signed(start.gap, 3)}
            if start.token_factor:
                row["tokens, × BF16"] = f"{start.token_factor:.2f}"
            if start.time_factor:
                row["time, × BF16"] = f"{start.time_factor:.2f}"
            for column, ratio in (("tokens/s", start.speed_ratio), ("GiB", start.memory_ratio)):
                row[column] += f" ({ratio:.2f})" if ratio else ""
            rows.append(row)
    return pd.DataFrame(rows)


def _start_row(run: Run) -> dict[str, str]:
    speed = run.record.speed
    rate, peak = (speed.tokens_per_second_median, speed.peak_memory_bytes) if speed else (None, None)
    return {
        "model": run.size,
        "recipe": run.label,
        "seed": str(run.record.seed),
        "loss (nats/token)": f"{run.validation_loss:.4f}",
        "− BF16": "–",
        "tokens, × BF16": "–",
        "time, × BF16": "–",
        "tokens/s": number(rate) if rate else "–",
        "GiB": f"{peak / 2**30:.1f}" if peak else "–",
    }


def _fp8_recipes(runs: RunSet) -> list[Recipe]:
    return [recipe for recipe in runs.recipes if recipe != "bf16"]


def _fp8_share(runs: RunSet, size: str, recipe: Recipe) -> str:
    """Of every kind of run of this size and recipe: with the head in BF16 and in FP8 where both were trained."""
    trained = [run.record for run in runs.where(size=size, recipe=recipe)]
    shares = {
        record.head: flops.fp8_share(ModelConfig(**record.model.model_dump(exclude={"tied"})), recipe, record.head)
        for record in trained
    }
    return ", ".join(f"{share:.0%}" for share in shares.values()) or "–"


def conversion(run: Run) -> pd.DataFrame:
    """What the precision swap did, one row a kind of layer instead of one a block."""
    table = pd.DataFrame(run.record.conversion, columns=["name", "shape", "precision", "reason"])
    table["layer"] = table["name"].str.replace(r"^blocks\.\d+\.", "", regex=True)
    grouped = table.groupby(["layer", "shape", "precision", "reason"], sort=False).size().rename("count").reset_index()
    return grouped.rename(columns={"shape": "shape (out × in)", "count": "layers of this kind"})


def planned_runs(plan: Plan, bf16_mfu: float) -> pd.DataFrame:
    """What a plan will cost before it runs: planned, never measured.

    Args:
        bf16_mfu: assumed share of BF16's peak FLOP/s, for the hours.
    """
    rows = []
    for config in plan.runs:
        per_token = flops.flops_per_token(config.model)
        rows.append(
            {
                "run": config.run,
                "parameters": f"{parameter_count(config.model):,}",
                "tokens": f"{config.tokens:,}",
                "tokens / parameter": f"{config.tokens / parameter_count(config.model):.1f}",
                "FLOPs, 6·N": scientific(per_token.per_token_6n * config.tokens),
                "FLOPs, matmul + attention": scientific(per_token.per_token_matmul_attention * config.tokens),
                "FLOPs, causal": scientific(per_token.per_token_matmul_attention_causal * config.tokens),
                "memory (GB)": f"{estimate.memory_bytes(config) / 1e9:.0f}",
                "hours, 1 H100": _hours(estimate.hours(config, bf16_mfu, 1)),
                "hours, 8 H100s": _hours(estimate.hours(config, bf16_mfu, 8)),
            }
        )
    return pd.DataFrame(rows)


def _hours(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
