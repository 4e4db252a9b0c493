"""Signs of trouble, for reading: instability, and what rounding does to the operands of GEMMs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd

from fp8lab.analysis import diagnosis, trouble
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.units import ranges, small_percent, span


def spikes(plans: Sequence[RunSet]) -> pd.DataFrame:
    """Signs of instability of each size and recipe, over all runs of `plans` and their decay branches."""
    rows = []
    for (size, recipe), families in trouble.families(plans).items():
        members = [member for family in families for member in family.members]
        counted = [member for family in families for member in family.counted]
        stability = [member.record.stability for member in counted if member.record.stability]
        rows.append(
            {
                "model": size,
                "recipe": recipe,
                "runs": len(families),
                "diverged": sum(family.diverged for family in families),
                "highest spike score": f"{max(one.spike_score for one in stability):.2%}" if stability else "–",
                "steps judged": _judged_steps(counted),
                "skipped steps": sum(one.skipped_steps for one in stability) if stability else "–",
                "largest gradient norm": f"{max(member.metrics['grad_norm'].max() for member in members):.2f}",
            }
        )
    return pd.DataFrame(rows)


def _judged_steps(runs: Sequence[Run]) -> str:
    judged = [steps for run in runs if (steps := trouble.judged_steps(run)) is not None]
    return f"{sum(judged):,} of {sum(map(trouble.own_steps, runs)):,}" if judged else "unknown"


def health(runs: Sequence[Run]) -> pd.DataFrame:
    """What rounding does to each kind of Linear in FP8 `runs`: medians of the second half, the worst of all blocks."""
    rows = []
    for run in runs:
        table = diagnosis.settled(run)
        grown = diagnosis.amax_growth(run)
        for (kind, tensor), group in table.groupby(["kind", "tensor"], observed=True, sort=False):
            growth = grown[(grown["kind"] == kind) & (grown["tensor"] == tensor)]["growth"].max()
            rows.append(
                {
                    "recipe": run.label,
                    "Linear": str(kind).rpartition(".")[2],
                    "operand": tensor,
                    "underflow": small_percent(group["underflow_fraction"].max()),
                    "saturation": small_percent(group["saturation_fraction"].max()),
                    "SQNR (dB)": f"{group['sqnr_db'].min():.1f}",
                    "largest amax, × first": f"{growth:.2f}",
                }
            )
    return pd.DataFrame(rows)


def rounding_losses(runs: Sequence[Run]) -> pd.DataFrame:
    """Operands of FP8 `runs` that pass a limit of `fp8lab.analysis.diagnosis`, a row a kind of Linear; maybe empty."""
    rows = []
    for run in runs:
        found = diagnosis.violations(run)
        for (kind, tensor, reason), group in found.groupby(["kind", "tensor", "reason"], observed=True, sort=False):
            values = group[diagnosis.COLUMN_OF[str(reason)]]
            worst = f"{values.min():.1f} dB" if reason == "SQNR" else small_percent(values.max())
            rows.append(
                {
                    "recipe": run.label,
                    "Linear": str(kind).rpartition(".")[2],
                    "operand": tensor,
                    "blocks": ranges(group["block"]),
                    "passes the limit of": reason,
                    "worst": worst,
                }
            )
    return pd.DataFrame(rows)


def underflow_by_size(runs: RunSet) -> pd.DataFrame:
    """What rounding flushes to zero as models grow: a row an FP8 recipe and size; maybe empty.

    Columns: recipe and what differs from its defaults, model, and over the Linears of the medians of the second half of
    the run: the largest and the middle share of gradients (grad_output) flushed; where scales are delayed, the middle
    and the most of the octaves of their format left unused above them (`diagnosis.health`); the largest share of inputs
    flushed, and the gradients' lowest SQNR (dB).
    """
    rows = []
    pairs = itertools.product(runs.recipes, runs.sizes)
    for run in (run for recipe, size in pairs for run in diagnosis.measured(runs.where(size=size, recipe=recipe))):
        table = diagnosis.settled(run).dropna(subset="underflow_fraction")
        gradients, inputs = (table[table["tensor"] == tensor] for tensor in ("grad_output", "input"))
        if len(gradients):
            rows.append(
                {
                    "recipe": run.label,
                    "model": run.size,
                    "gradients, most": small_percent(gradients["underflow_fraction"].max()),
                    "gradients, middle": small_percent(gradients["underflow_fraction"].median()),
                    "octaves unused": _octaves(gradients["unused_octaves"].dropna()),
                    "inputs, most": small_percent(inputs["underflow_fraction"].max()),
                    "SQNR (dB)": f"{gradients['sqnr_db'].min():.1f}",
                }
            )
    return pd.DataFrame(rows)


def _octaves(unused: pd.Series) -> str:
    """From the middle to the most."""
    return span((unused.median(), unused.max()), 1) if len(unused) else "–"
