"""What FP8 health says: which layers lose too much to rounding, and are better kept in BF16.

A Linear is named when one of its operands passes a limit in the median of the second half of its run's
measurements: neither the first steps nor one bad batch decide. No paper gives limits to stop at. FP8-LM
(2310.18313) watches the same three quantities to choose scales, and these are ours:

- SQNR under 20 dB: an error of a tenth of the signal. A Gaussian tensor has 31.5 dB in E4M3 and 25.5 dB in
  E5M2, so this is one bit of mantissa (6 dB) less than even E5M2 should have;
- underflow over 1%: as much as one outlier costs that inflates a Gaussian tensor's amax a thousand times,
  which SQNR does not show (`fp8lab.training.health`);
- saturation over 0.01%: a clipped value is among the largest and its error is unbounded, while a flushed one
  loses at most half of the smallest number. Hence a hundredth of the limit for underflow.

The limits ask what rounding does to a tensor, not what the loss makes of it: the losses are compared elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fp8lab.analysis.runs import Run, RunSet
from fp8lab.config import Fp8Format, recorded_fused
from fp8lab.units import unique

MIN_SQNR_DB = 20.0
MAX_UNDERFLOW = 0.01
MAX_SATURATION = 1e-4
KINDS = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
"""The Linears of a block."""
LARGEST: dict[Fp8Format, float] = {"e4m3": 448.0, "e5m2": 57344.0}
"""The largest number of each format."""
OPERANDS = ("input", "weight", "grad_output")
DELAYED_SCALES = "Delayed scales are set before their tensor is known."
"""What a reader of `overflows` has to know first."""
COLUMN_OF = {"underflow": "underflow_fraction", "saturation": "saturation_fraction", "SQNR": "sqnr_db"}
"""Column of each quantity that has a limit."""


def health(run: Run) -> pd.DataFrame:
    """The run's health by step, kind and block, with columns of our own.

    `block`: its number. `kind`: one of `KINDS`. `unused_octaves`: powers of two between the largest gradient measured
    and the largest number of its format. Only `fused` has them: its scales are set before their tensor is known. The
    largest gradient is that of the tokens measured, which overstates what the whole batch leaves unused.
    """
    table = run.health
    parts = table["layer"].str.extract(r"^blocks\.(?P<block>\d+)\.(?P<kind>.+)$")
    table = table.assign(
        block=parts["block"].astype("Int64"),
        kind=pd.Categorical(parts["kind"], KINDS),
        unused_octaves=_unused_octaves(run, table),
    )
    return table.dropna(subset=["block", "kind"]).sort_values(["step", "kind", "block"], ignore_index=True)


def _unused_octaves(run: Run, table: pd.DataFrame) -> pd.Series:
    ours = recorded_fused(run.record.config)
    known = (table["tensor"] == "grad_output") & (table["amax"] > 0) & (ours is not None)
    largest = LARGEST[ours.gradient_format] if ours else math.nan
    return pd.Series(np.log2(largest / (table["amax"] * table["scale"]).where(known)), table.index)


def settled(run: Run) -> pd.DataFrame:
    """Medians over the second half of the run's measurements: a row a layer and tensor, in BF16 too."""
    table = health(run)
    late = table[table["step"].isin(_second_half(table))]
    keys = ["kind", "block", "layer", "tensor"]
    return late.groupby(keys, observed=True, sort=False).median(numeric_only=True).drop(columns="step").reset_index()


def settled_measurements(runs: RunSet) -> list[tuple[Run, int]]:
    """How many measurements the medians of `settled` are of, for each FP8 run that tells of its size and recipe."""
    tells = [run for size in runs.sizes for run in measured(runs.where(size=size))]
    return [(run, len(_second_half(run.health))) for run in tells if run.recipe != "bf16"]


def _second_half(table: pd.DataFrame) -> list[int]:
    steps = sorted(table["step"].unique())
    return steps[len(steps) // 2 :]


def violations(run: Run) -> pd.DataFrame:
    """The rows of `settled` that pass a limit, with the column `reason`: 'underflow', 'saturation' or 'SQNR'."""
    table = settled(run)
    passed = {
        "underflow": table["underflow_fraction"] > MAX_UNDERFLOW,
        "saturation": table["saturation_fraction"] > MAX_SATURATION,
        "SQNR": table["sqnr_db"] < MIN_SQNR_DB,
    }
    found = [table[is_over].assign(reason=reason) for reason, is_over in passed.items()]
    return pd.concat(found, ignore_index=True)


def flushed_gradients(run: Run) -> pd.Series:
    """Share (0 to 1) of gradients that rounding flushes to zero, by tokens trained at each measurement.

    The mean of all Linears' shares, however many gradients each has; empty for a run that measured none.
    """
    table = run.health
    gradients = table[table["tensor"] == "grad_output"].dropna(subset="underflow_fraction")
    shares = gradients.groupby("step")["underflow_fraction"].mean()
    return shares.set_axis(shares.index.astype(float) * run.record.global_batch_tokens)


def keep_in_bf16(run: Run) -> list[str]:
    """What `high_precision` should hold for a run like this: Linears, or whole blocks for `fused`; nothing if empty."""
    found = violations(run)
    if run.recipe == "fused":
        return [f"blocks.{block}.*" for block in sorted(set(found["block"]))]
    return unique(found["layer"])


def limits() -> str:
    """The limits, in a sentence for the reader."""
    return (
        f"Named is a Linear with an operand that loses over {MAX_UNDERFLOW:.0%} of its values to underflow or "
        f"{100 * MAX_SATURATION:g}% to saturation, or has an SQNR under {MIN_SQNR_DB:.0f} dB, in the median of the "
        "second half of the measurements. The limits are ours; they ask what rounding does to a tensor, not what "
        "the loss makes of it."
    )


def overflows(run: Run) -> str | None:
    """How often whole tensors left their range, as a clause; None where the recipe's scales follow each tensor."""
    stability = run.record.stability
    if stability is None or stability.saturated_steps is None:
        return None
    counts = {"exceeded its scale": stability.saturated_steps, "lay below it": stability.underflowing_steps or {}}
    parts = []
    for what, steps_of in counts.items():
        if not steps_of:
            parts.append(f"none {what}")
            continue
        worst = max(steps_of, key=lambda name: steps_of[name])
        often = f"{steps_of[worst]:,} of {run.record.steps:,} steps"
        parts.append(f"{len(steps_of)} {what} at least once, most often `{worst}`, in {often}")
    return f"of the tensors of {run.named}, {'; '.join(parts)}"


def measured(runs: Sequence[Run]) -> list[Run]:
    """The runs that measured their health: of each recipe, by its defaults and with each change of them, one.

    It is the one with most measurements, and of several the first.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        if not run.health.empty:
            alike.setdefault(run.named, []).append(run)
    return [max(group, key=_measurements) for group in alike.values()]


def _measurements(run: Run) -> int:
    return int(run.health["step"].nunique())


def measured_sizes(runs: RunSet) -> list[str]:
    """Sizes at which an FP8 run measured its health, smallest first."""
    return [size for size in runs.sizes if any(run.recipe != "bf16" for run in measured(runs.where(size=size)))]


def amax_growth(run: Run) -> pd.DataFrame:
    """`health` with the column `growth`: amax over that of the first measurement."""
    table = health(run)
    first = table.groupby(["layer", "tensor"])["amax"].transform("first")
    return table.assign(growth=table["amax"] / first)
