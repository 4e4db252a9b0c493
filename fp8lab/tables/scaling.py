"""Fitted laws and what they say, for reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from fp8lab.analysis import laws, scaling, selection
from fp8lab.analysis.laws import JointLaw
from fp8lab.analysis.scaling import HeldOut
from fp8lab.units import number, p_value, scientific, signed, signed_percent, span


def extrapolation_table(table: pd.DataFrame) -> pd.DataFrame:
    """`scaling.extrapolated` for reading, without its measured row."""
    beyond = table.iloc[1:]
    columns = {
        "model": beyond["size"],
        "N over the largest measured": beyond["factor"].map("{:.1f}×".format),
        "tokens": beyond["tokens"].map(number),
        "loss, extrapolated (nats/token)": beyond["loss"].map("{:.3f}".format),
        "95% interval": [span((low, high), 2) for low, high in zip(beyond["low"], beyond["high"], strict=True)],
        "its drop from the largest measured": beyond["drop"].map("{:.3f}".format),
        "95% interval of the drop": [
            span((low, high), 2) for low, high in zip(beyond["drop_low"], beyond["drop_high"], strict=True)
        ],
    }
    return pd.DataFrame(columns | {f"drop by {name}": beyond[name].map("{:.3f}".format) for name in laws.PUBLISHED})


def law_table(fits: Mapping[str, tuple[JointLaw, Sequence[JointLaw]]]) -> pd.DataFrame:
    """Constants of fitted laws with 95% intervals: a row a constant, a column a law.

    Args:
        fits: name -> the law and its refits to drawn runs.
    """
    constants: dict[str, tuple[Callable[[JointLaw], float], int]] = {
        "E (nats/token)": (lambda law: law.bf16.E, 2),
        "α": (lambda law: law.bf16.alpha, 2),
        "β": (lambda law: law.bf16.beta, 2),
        "a of N ∝ Cᵃ": (lambda law: law.bf16.size_exponent, 2),
    }
    columns: dict[str, list[str]] = {"constant": [*constants, "A", "B"]}
    for name, (law, draws) in fits.items():
        columns[name] = [_with_interval(value, law, draws, digits) for value, digits in constants.values()]
        columns[name] += [scientific(law.bf16.A), scientific(law.bf16.B)]
    return pd.DataFrame(columns)


def _with_interval(
    value: Callable[[JointLaw], float], law: JointLaw, draws: Sequence[JointLaw], digits: int = 3
) -> str:
    low, high = scaling.interval([value(drawn) for drawn in draws])
    return f"{value(law):.{digits}f} ({span((low, high), digits)})".replace("-", "−")


def multiplier_table(
    tokens: tuple[JointLaw, Sequence[JointLaw]], parameters: tuple[JointLaw, Sequence[JointLaw]], n: float, d: float
) -> pd.DataFrame:
    """What each FP8 recipe makes of its budget, and what that is in loss at one size.

    Args:
        tokens, parameters: the joint law on each budget, and its refits.
        n, d: parameters and tokens at which the loss gap is given.
    """

    def row(recipe: str) -> dict[str, object]:
        def share(law: JointLaw) -> float:
            return law.multipliers[recipe]

        def gap(law: JointLaw) -> float:
            return float(law(n, d, recipe) - law(n, d))

        return {
            "recipe": recipe,
            "share of its tokens": _with_interval(share, *tokens),
            "share of its parameters": _with_interval(share, *parameters),
            "loss gap (nats/token)": _with_interval(gap, *tokens, digits=4),
        }

    return pd.DataFrame([row(recipe) for recipe in tokens[0].multipliers])


def gap_by_budget(gaps: pd.DataFrame) -> pd.DataFrame:
    """`losses.gaps_by_budget` for reading: a row a recipe, two columns a budget."""
    rows: dict[str, dict[str, object]] = {}
    for gap in gaps.to_dict("records"):
        row = rows.setdefault(gap["recipe"], {"recipe": gap["recipe"]})
        reach = "" if np.isnan(gap["reach"]) else f" ± {gap['reach']:.4f}"
        row[f"{gap['budget']:g} tokens/N"] = signed(gap["mean"]) + reach
        row[f"{gap['budget']:g}, by the law"] = "–" if np.isnan(gap["by_law"]) else signed(gap["by_law"])
    return pd.DataFrame(rows.values())


def held_out_table(held_out: pd.DataFrame, predictions: Sequence[HeldOut], unit: str, digits: int = 3) -> pd.DataFrame:
    """Predicted and measured losses of runs that a law was not fitted to.

    Args:
        held_out: their rows of `losses.final_losses`.
        predictions: one a row.
        unit: of the losses.
    """
    rows = []
    for (_, run), prediction in zip(held_out.iterrows(), predictions, strict=True):
        low, high = prediction.interval or (np.nan, np.nan)
        rows.append(
            {
                "model": run["size"],
                "recipe": run["recipe"],
                "tokens / N": f"{run['budget']:g}",
                f"predicted ({unit})": f"{prediction.predicted:.{digits}f}",
                f"measured ({unit})": f"{prediction.measured:.{digits}f}",
                "error": signed_percent(prediction.error, 2),
                "95% interval": f"{signed_percent(low, 2)} to {signed_percent(high, 2)}",
            }
        )
    return pd.DataFrame(rows)


PARAMETER_CONVENTIONS = {
    "total, the tied embedding once (ours)": "parameters",
    "without the embedding": "non_embedding",
}


FLOP_CONVENTIONS = {
    "6·N_matmul + 6·L·d·T, causal (ours)": "flops_causal",
    "6·N_matmul + 12·L·d·T": "flops_matmul_attention",
    "6·N": "flops_6n",
    "6·N without the embedding": "flops_6n_non_embedding",
}


def exponents_by_parameters(points: pd.DataFrame, near: JointLaw) -> pd.DataFrame:
    """The joint law under each convention of N.

    Args:
        points: as `losses.final_losses` gives them.
        near: the law under ours.
    """
    rows = []
    for name, column in PARAMETER_CONVENTIONS.items():
        law = scaling.fit_joint(points.assign(parameters=points[column].astype(float)), near.on)
        shares = {f"{recipe}, share of its {near.on}": f"{share:.3f}" for recipe, share in law.multipliers.items()}
        exponent = {"a of N ∝ Cᵃ": f"{law.bf16.size_exponent:.2f}"}
        rows.append({"N counts parameters": name} | _constants(law) | exponent | shares)
    return pd.DataFrame(rows)


MOST_CHOICES = 6
"""Of the shortest schedule, that are shown besides the one in use."""


def compared(choices: Sequence[selection.Choice], fitted: pd.DataFrame) -> list[selection.Choice]:
    """Of `selection.choices` the first `MOST_CHOICES`, and the one whose rows are `fitted`."""
    return [choice for position, choice in enumerate(choices) if position < MOST_CHOICES or choice.is_of(fitted)]


def exponents_by_length(choices: Sequence[selection.Choice], fitted: pd.DataFrame) -> pd.DataFrame:
    """The joint law of each choice for reading, the one whose rows are `fitted` marked as in use."""
    rows = []
    for choice in choices:
        measures = {
            "steps": f"{choice.steps:,}" + " ←" * choice.is_of(fitted),
            "misfit": "–" if choice.misfit is None else f"{choice.misfit:.4f}",
            "p": "–" if choice.p_of_fit is None else p_value(choice.p_of_fit),
        }
        shares = {recipe: f"{share:.3f}" for recipe, share in choice.law.multipliers.items()}
        rows.append(measures | _constants(choice.law) | shares)
    return pd.DataFrame(rows)


def _constants(law: JointLaw) -> dict[str, object]:
    """BF16's constants without intervals, to compare choices of convention or of runs."""
    return {
        "E (nats)": f"{law.bf16.E:.2f}",
        "α": f"{law.bf16.alpha:.3f}",
        "β": f"{law.bf16.beta:.3f}",
    }


def exponents_by_flops(points: pd.DataFrame) -> pd.DataFrame:
    """The power law of the efficient frontier, L = (C_c / C) ** γ, under each convention of compute.

    Args:
        points: final losses of one precision.
    """
    points = points.assign(flops_6n_non_embedding=6.0 * points["non_embedding"] * points["tokens"])
    rows = []
    for name, column in FLOP_CONVENTIONS.items():
        efficient = points.iloc[scaling.frontier(points[column], points["loss"])]
        law = scaling.fit_power_law(efficient[column], efficient["loss"])
        rows.append(
            {
                "FLOPs a token": name,
                "compute of the largest run": scientific(points[column].max()),
                "over ours": f"{points[column].max() / points['flops_causal'].max():.3f}",
                "γ": f"{law.exponent:.4f}",
                "runs on the frontier": len(efficient),
            }
        )
    return pd.DataFrame(rows)
