"""Speed and what it costs, for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from fp8lab.analysis.decision import Matched, affordable_gap
from fp8lab.analysis.occasions import SpeedRun
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.analysis.slopes import FittedLaw
from fp8lab.analysis.timings import fp8_only, short_device, speed_ratios
from fp8lab.config import HEADS, MODELS, RECIPES
from fp8lab.flops import flops_per_token, fp8_share, linear_weights
from fp8lab.units import signed


def speed_table(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """`timings.speed_ratios` for reading."""
    table = speed_ratios(speeds)
    return pd.DataFrame(
        {
            "model": table["model"],
            "batch × context": [f"{b} × {t}" for b, t in zip(table["micro_batch"], table["seq_len"], strict=True)],
            "recipe": table["recipe"],
            "head": table["head"],
            "step (ms)": table["step_ms"].map("{:.1f}".format),
            "tokens/s": table["tokens_per_second"].map("{:,.0f}".format),
            "× BF16": table["ratio"].map("{:.3f}".format),
            "over": table["baselines"].map(", ".join),
            "95% interval": [
                "–" if low != low else f"{low:.3f}–{high:.3f}"
                for low, high in zip(table["interval_low"], table["interval_high"], strict=True)
            ],
            "smallest to largest round": [
                f"{low:.3f}–{high:.3f}" for low, high in zip(table["low"], table["high"], strict=True)
            ],
            "rounds": [
                f"{rounds} ({left_out} left out)" if left_out else str(rounds)
                for rounds, left_out in zip(table["rounds"], table["left_out"], strict=True)
            ],
            "occasions": table["occasions"],
            "peak memory (GiB)": (table["peak_memory_bytes"] / 2**30).map("{:.1f}".format),
        }
    )


def gemm_ceiling(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """What FP8's GEMMs alone would give, their casts free, beside the fastest recipe that was measured.

    All but the GEMMs takes BF16's time there, so a recipe that fuses other work as well can do better.
    The blocks' GEMMs only: heads in FP8 are left out on both sides. Where a case was measured on several
    occasions, the last counts.
    """
    ratios = speed_ratios(speeds)
    ratios = ratios[ratios["head"] == "bf16"]
    gemms = {
        (speed.device, case): results["gemms"]
        for speed in speeds
        for case, results in speed.cases.items()
        if "gemms" in results
    }
    rows = []
    for setting, group in ratios.groupby("setting", sort=False):
        times = gemms.get((group["device"].iloc[0], group["case"].iloc[0]))
        fp8 = fp8_only(group)
        if times is None or fp8.empty:
            continue
        bf16_ms, fp8_ms = _block_gemm_ms(times, "bf16"), _block_gemm_ms(times, "fp8")
        step_ms = group[group["recipe"] == group["baseline"].iloc[0]]["step_ms"].iloc[0]
        fastest = fp8.sort_values("ratio").iloc[-1]
        rows.append(
            {
                "model, context, micro-batch": setting,
                "BF16 step (ms)": f"{step_ms:.1f}",
                "its blocks' GEMMs (ms)": f"{bf16_ms:.1f}",
                "in FP8 (ms)": f"{fp8_ms:.1f}",
                "× BF16, casts free": f"{step_ms / (step_ms - bf16_ms + fp8_ms):.2f}",
                "× BF16, fastest measured": f"{fastest['ratio']:.2f}",
                "recipe": fastest["recipe"],
            }
        )
    return pd.DataFrame(rows)


def _block_gemm_ms(times: Mapping[str, Mapping[str, float]], precision: str) -> float:
    return sum(
        layer["count"] * sum(layer[f"{gemm}_{precision}"] for gemm in ("forward", "grad_input", "grad_weight"))
        for name, layer in times.items()
        if name != "head"
    )


def bound(sizes: Sequence[str]) -> pd.DataFrame:
    """The most that casting alone can gain at named sizes: every GEMM of the blocks in FP8, exactly twice as fast."""
    rows = []
    for name in sizes:
        model = MODELS[name]
        weights, per_token = linear_weights(model), flops_per_token(model).per_token_matmul_attention_causal
        linear = 6 * sum(weights.values()) / per_token
        in_blocks, with_head = (linear * fp8_share(model, "tensorwise", head) for head in HEADS)
        rows.append(
            {
                "model": name,
                "vocabulary": f"{model.vocab_size:,}",
                "linear layers in blocks": f"{in_blocks:.0%}",
                "head": f"{linear - in_blocks:.0%}",
                "attention": f"{1 - linear:.0%}",
                "bound, head in BF16": f"{1 / (1 - in_blocks / 2):.2f}×",
                "bound, head in FP8": f"{1 / (1 - with_head / 2):.2f}×",
            }
        )
    return pd.DataFrame(rows)


def scaling_out(runs: RunSet) -> pd.DataFrame:
    """Tokens/s of one to many GPUs; efficiency is over as many times one GPU's, same model and recipe."""
    rates = {
        (run.size, run.recipe, *_places(run)): speed.tokens_per_second_median
        for run in runs.runs
        if (speed := run.record.speed) and speed.tokens_per_second_median
    }
    rows = []
    for run in sorted(runs.runs, key=lambda run: (run.parameters, run.recipe, _places(run))):
        (count, sharding), speed = _places(run), run.record.speed
        if speed is None or speed.tokens_per_second_median is None:
            continue
        rate = speed.tokens_per_second_median
        one, memory = rates.get((run.size, run.recipe, 1, "")), speed.peak_memory_bytes
        bf16 = rates.get((run.size, "bf16", count, sharding)) if run.recipe != "bf16" else None
        rows.append(
            {
                "model": run.size,
                "recipe": run.recipe,
                "GPUs": count,
                "sharding": sharding,
                "tokens/s": f"{rate:,.0f}",
                "efficiency": f"{rate / one / count:.1%}" if one else "",
                "BF16-MFU": "" if speed.bf16_mfu is None else f"{speed.bf16_mfu:.1%}",
                "peak memory of a GPU (GiB)": "" if memory is None else f"{memory / 2**30:.1f}",
                "× BF16": f"{rate / bf16:.2f}" if bf16 else "–",
            }
        )
    return pd.DataFrame(rows)


def _places(run: Run) -> tuple[int, str]:
    """How many GPUs, and how the state is spread over them: not at all on one."""
    count = run.record.provenance.device_count
    return count, "" if count == 1 else run.record.config["sharding"]


def matched_table(found: Sequence[Matched]) -> pd.DataFrame:
    """`decision.loss_matched` for reading."""
    return pd.DataFrame(
        [
            {
                "model": row.measured.size,
                "recipe": row.measured.recipe,
                "seeds": f"{row.measured.gap.seeds}{' (scatter assumed)' if row.measured.assumed else ''}",
                "FP8 − BF16 (nats)": _gap(row),
                "slope": row.slope.text() if row.slope else "unknown",
                "tokens, × BF16": row.tokens.text(3) if row.tokens else "unknown",
                "tokens/s, × BF16": row.ratio.text() if row.ratio else "not timed",
                "timed on": short_device(row.device) if row.device else "–",
                "trained on": short_device(row.trained_on),
                "loss-matched speed-up": row.speedup.text() if row.speedup else "–",
            }
            for row in found
        ]
    )


def _gap(row: Matched) -> str:
    gap = row.measured.gap
    spread = f" ({signed(gap.interval[0])} to {signed(gap.interval[1])})" if gap.interval else ""
    return signed(gap.mean) + spread


def _interval(row: pd.Series) -> str:
    if row["interval_low"] != row["interval_low"]:
        return f"{row['rounds']} round{'s' if row['rounds'] > 1 else ''}"
    return f"{row['interval_low']:.2f}–{row['interval_high']:.2f}"


def switch_table(table: pd.DataFrame, laws: Sequence[FittedLaw]) -> pd.DataFrame:
    """`timings.with_verdicts` for a decision: a row a setting and FP8 recipe, narrow models first.

    The loss that a gain would pay for is a prediction, only of models that have a name, and only where one of `laws`
    reaches: see `affordable_gap`.
    """
    order = ["width", "seq_len", "micro_batch_tokens"]
    chosen = table[table["recipe"].isin(RECIPES[1:])].sort_values(order, kind="stable")
    rows = []
    for _, row in chosen.iterrows():
        pays = row["verdict"] == "faster" and row["model"] in MODELS
        affordable = affordable_gap(row["model"], row["ratio"], laws) if pays else None
        rows.append(
            {
                "device": short_device(row["device"]),
                "width": f"{row['width']:,}",
                "recipe": row["recipe"] + (" + head" if row["head"] == "fp8" else ""),
                "tokens/s, × BF16": f"{row['ratio']:.2f} ({_interval(row)})",
                "faster": {"faster": "yes", "slower": "no"}.get(row["verdict"], "undecided"),
                "GiB (× BF16)": f"{row['peak_memory_bytes'] / 2**30:.0f} ({row['memory_ratio']:.2f})",
                "pays for (nats)": "–" if not pays else f"{affordable:.3f}" if affordable is not None else "unknown",
                "batch × context": f"{row['micro_batch']} × {row['seq_len']:,}",
                "model": row["model"],
            }
        )
    found = pd.DataFrame(rows, columns=SWITCH_COLUMNS)
    return found if table["device"].nunique() > 1 else found.drop(columns="device")


SWITCH_COLUMNS = [
    "device", "width", "recipe", "tokens/s, × BF16", "faster", "GiB (× BF16)", "pays for (nats)", "batch × context",
    "model",
]  # fmt: skip
