"""Losses and their gaps, for reading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fp8lab.analysis.comparison import EQUIVALENCE_MARGIN, LEVEL, TARGET_HALF_WIDTH, Deviation, Gap
from fp8lab.analysis.losses import MeasuredGap
from fp8lab.analysis.numerics import Variant, find
from fp8lab.analysis.variance import Study
from fp8lab.units import number, p_value, signed, signed_percent, unique


def budget_table(points: pd.DataFrame) -> pd.DataFrame:
    """`losses.final_losses` for reading: a row a size and recipe, a column a budget; means over seeds."""
    losses = points.pivot_table(index=["parameters", "size", "recipe"], columns="budget", values="loss", sort=False)
    budgets = sorted(losses.columns)
    table = losses.reset_index()
    columns = {"model": table["size"], "N": table["parameters"].map(number), "recipe": table["recipe"]}
    return pd.DataFrame(
        columns | {f"{budget:g} tokens/N": table[budget].map("{:.4f}".format, na_action="ignore") for budget in budgets}
    )


def loss_gaps(gaps: Sequence[MeasuredGap]) -> pd.DataFrame:
    """Validation loss of each FP8 recipe minus BF16's, and what so many seeds let one say of it."""
    return pd.DataFrame([_measured_row(measured) for measured in gaps])


def _measured_row(measured: MeasuredGap) -> dict[str, object]:
    sides = [
        f"{count} {name}" for name, count in (("FP8", measured.diverged), ("BF16", measured.bf16_diverged)) if count
    ]
    columns = _gap_columns(measured.gap, measured.assumed)
    if sides:
        columns["so"] = f"{columns['so']}, of those that finished"
    run = measured.runs.where(size=measured.size, recipe=measured.recipe)[0]
    named = {"model": measured.size, "recipe": run.label}
    design = {"learning rate": f"{measured.baseline.learning_rate:.2g}", "plan": _plan(measured)}
    return named | columns | design | {"diverged": ", ".join(sides) or "none"}


def _plan(measured: MeasuredGap) -> str:
    """Where the FP8 runs are recorded, and the BF16 ones where that is elsewhere."""
    sides = (measured.runs.where(size=measured.size, recipe=recipe) for recipe in (measured.recipe, "bf16"))
    return ", ".join(unique(run.record.plan for runs in sides for run in runs))


def _gap_columns(gap: Gap, assumed: bool = False) -> dict[str, object]:
    """A gap as a reader sees it.

    Args:
        assumed: whether its interval is.
    """
    interval, how, equivalent = "–", "–", gap.equivalence_p()
    if gap.interval is not None:
        interval = f"{signed(gap.interval[0])} to {signed(gap.interval[1])}"
        how = "assumed" if assumed else "pairs" if gap.paired else "two groups"
    return {
        "seeds": gap.seeds,
        "FP8 − BF16 (nats/token)": signed(gap.mean),
        "95% interval": interval,
        "from": how,
        f"p, beyond ±{EQUIVALENCE_MARGIN:g}": "–" if equivalent is None else p_value(equivalent),
        "so": verdict(gap),
        "BF16 loss (nats/token)": f"{gap.baseline:.4f}",
        "relative": signed_percent(gap.mean / gap.baseline, 2),
        "correlation of seeds": "–" if gap.correlation is None else signed(gap.correlation.value, 2),
    }


def verdict(gap: Gap) -> str:
    """What the seeds of a gap can carry, in a few words; equivalent is within `EQUIVALENCE_MARGIN`."""
    equivalence = gap.equivalence_p()
    if equivalence is None:
        return "cannot tell: one seed" if gap.seeds == 1 else "cannot tell"
    equivalent = equivalence < 1 - LEVEL
    if gap.excludes_zero:
        return ("worse" if gap.mean > 0 else "better") + (", yet equivalent" if equivalent else "")
    return "equivalent" if equivalent else "cannot tell: too few seeds"


def variance_designs(study: Study) -> pd.DataFrame:
    """What each design of the variance study costs for an interval of plus or minus `TARGET_HALF_WIDTH`."""
    rows = []
    for cell in study.cells:
        pairs, minutes = cell.comparison.pairs_range(), cell.minutes_needed()
        cost = study.loss_cost(cell)
        rows.append(
            {
                "design": cell.design,
                "weights": cell.weights,
                "seeds": cell.seeds,
                "BF16 loss (nats/token)": f"{np.mean(list(cell.losses('bf16').values())):.4f}",
                "against base": "–" if cell is study.base else _with_reach(cost),
                "sd (95% interval)": _deviation(cell.scatter),
                "sd of differences": "–" if cell.differences is None else _deviation(cell.differences),
                "from": "pairs" if cell.comparison.paired else "two groups",
                f"pairs for ±{TARGET_HALF_WIDTH:g}": f"{cell.comparison.pairs_needed()} ({pairs[0]}–{pairs[1]})",
                "GPU minutes for it": f"{minutes[0]:.1f} ({minutes[1]:.1f}–{minutes[2]:.1f})",
            }
        )
    return pd.DataFrame(rows)


def _deviation(deviation: Deviation) -> str:
    low, high = deviation.interval
    return f"{deviation.value:.4f} ({low:.4f}–{high:.4f})"


def _with_reach(gap: Gap) -> str:
    return signed(gap.mean) + (f" ± {gap.half_width:.4f}" if gap.half_width is not None else "")


def numerics(variants: Sequence[Variant]) -> pd.DataFrame:
    """What each variant of `fp8lab.analysis.numerics` ends at, and its differences to BF16 and default ``tensorwise``.

    That to ``tensorwise`` is to the one with the same head; of heads in FP8 there is one more, to the same in BF16.
    """
    heads = any(variant.head == "fp8" for variant in variants)
    rows = []
    for variant in variants:
        losses = list(variant.losses.values())
        row = {
            "recipe": variant.recipe,
            "head": variant.head,
            "changed": variant.changed_settings or "–",
            "seeds": len(losses),
            "loss (nats/token)": f"{np.mean(losses):.4f}",
            "sd": f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "–",
        }
        references = {
            "bf16": find(variants, "bf16"),
            "tensorwise": find(variants, "tensorwise", variant.head) if variant.recipe != "bf16" else None,
        }
        if heads:
            references["its BF16 head"] = find(variants, variant.recipe, changes=variant.changed_settings)
        for name, reference in references.items():
            shown = "–"
            if reference is not None and reference is not variant:
                shown = _with_interval(variant.minus(reference))
            row[f"− {name} (95% interval)"] = shown
        rows.append(row)
    return pd.DataFrame(rows)


def _with_interval(gap: Gap) -> str:
    if gap.interval is None:
        return f"{signed(gap.mean)} (one seed)"
    return f"{signed(gap.mean)} ({signed(gap.interval[0])} to {signed(gap.interval[1])})"


def variance_gaps(study: Study) -> pd.DataFrame:
    """FP8 minus BF16 in each cell of the variance study."""
    return pd.DataFrame(
        [{"design": cell.design, "weights": cell.weights} | _gap_columns(cell.gap) for cell in study.cells]
    )
