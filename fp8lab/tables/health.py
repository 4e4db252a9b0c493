"""Signs of trouble, for reading: instability, and what rounding does to the operands of GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fp8lab import diagnosis
from fp8lab.results import Run, RunSet
from fp8lab.units import ranges


def spikes(runs: RunSet) -> pd.DataFrame:
    """Signs of instability of each run."""
    rows = [
        {
            "model": run.size,
            "recipe": run.recipe,
            "seed": run.record.seed,
            "spike score": f"{run.record.stability.spike_score:.2%}" if run.record.stability else "–",
            "steps judged": _judged_steps(run),
            "skipped steps": run.record.stability.skipped_steps if run.record.stability else "–",
            "largest gradient norm": f"{run.metrics['grad_norm'].max():.2f}",
            "status": run.record.status,
        }
        for run in (*runs.runs, *(run for run in runs.unfinished if run.record.status == "diverged"))
    ]
    return pd.DataFrame(rows)


def _judged_steps(run: Run) -> str:
    judged = run.record.stability.judged_steps if run.record.stability else None
    return "unknown" if judged is None else f"{judged:,} of {run.record.steps:,}"


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
                    "recipe": run.recipe,
                    "Linear": str(kind).rpartition(".")[2],
                    "operand": tensor,
                    "underflow": _small_share(group["underflow_fraction"].max()),
                    "saturation": _small_share(group["saturation_fraction"].max()),
                    "SQNR (dB)": f"{group['sqnr_db'].min():.1f}",
                    "largest amax, × first": f"{growth:.2f}",
                }
            )
    return pd.DataFrame(rows)


def rounding_losses(runs: Sequence[Run]) -> pd.DataFrame:
    """The operands of FP8 `runs` that pass a limit of `fp8lab.diagnosis`, a row a kind of Linear; maybe empty."""
    rows = []
    for run in runs:
        found = diagnosis.violations(run)
        for (kind, tensor, reason), group in found.groupby(["kind", "tensor", "reason"], observed=True, sort=False):
            values = group[diagnosis.COLUMN_OF[str(reason)]]
            worst = f"{values.min():.1f} dB" if reason == "SQNR" else _small_share(values.max())
            rows.append(
                {
                    "recipe": run.recipe,
                    "Linear": str(kind).rpartition(".")[2],
                    "operand": tensor,
                    "blocks": ranges(group["block"]),
                    "passes the limit of": reason,
                    "worst": worst,
                }
            )
    return pd.DataFrame(rows)


def _small_share(value: float) -> str:
    """0, or a percentage with two digits that count."""
    return "0" if value == 0 else f"{100 * value:.2g}%"
