"""What every figure shares: one style, and one colour and marker a precision.

Colours are from Okabe and Ito's palette, distinguishable with any common colour blindness. Every axis names its
quantity and unit. Figures drawn from the demo's runs carry 'toy scale, CPU' inside the picture, so that it
travels with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fp8lab.analysis.runs import RunSet

RECIPE_COLOURS: dict[str, str] = {
    "bf16": "#0072B2",
    "tensorwise": "#D55E00",
    "rowwise": "#E69F00",
    "rowwise_with_gw_hp": "#CC79A7",
    "fused": "#009E73",
    "tensorwise_fast": "#8C3B00",
    "fused_precise": "#00664D",
    "fused_e5m2": "#7FC97F",
    "te_bf16": "#56B4E9",
    "te_current": "#7A7A7A",
    "te_delayed": "#000000",
    "nanochat": "#B8A200",
}
"""Colour of each precision; peers of the speed measurements have theirs too."""


RECIPE_MARKERS: dict[str, str] = dict(zip(RECIPE_COLOURS, "osD^vXPd<*ph", strict=True))
"""Marker of each precision: colour is never the only sign."""


NEUTRAL = "#4d4d4d"


SLATE = "#6b7f8c"


WIDTH = 4.7
"""Inches. Narrow, so that labels can still be read where a telephone shrinks the figure."""


def use_style() -> None:
    """Set the style that every figure shares."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "font.size": 9.5,
            "axes.labelsize": 9.5,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.edgecolor": "#b0b0b0",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#e6e6e6",
            "lines.linewidth": 1.6,
            "lines.markersize": 6,
            "figure.constrained_layout.use": True,
            # A fixed salt makes the same records give the same bytes.
            "svg.hashsalt": "fp8lab",
        },
    )


def finish(figure: Figure, axes: Axes, recipes: Sequence[str], toy: bool, others: Sequence[Line2D] = ()) -> None:
    """Add the legend of `recipes` above everything and, for the demo's runs, 'toy scale, CPU' above `axes`.

    Args:
        others: what the legend names after the recipes.
    """
    if recipes:
        handles = [
            Line2D([], [], label=recipe, **point_style(recipe), linestyle="-")
            for recipe in sorted(recipes, key=list(RECIPE_COLOURS).index)
        ]
        handles += others
        figure.legend(
            handles=handles, loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.4, handlelength=1.6
        )
    if toy:
        axes.set_title(
            "toy scale, CPU", loc="right", fontsize=9, fontstyle="italic", fontweight="normal", color=NEUTRAL
        )


def mark_toy(figure: Figure, toy: bool) -> None:
    """'toy scale, CPU' above panels that have titles of their own."""
    if toy:
        figure.suptitle(
            "toy scale, CPU", x=0.99, ha="right", fontsize=9, fontstyle="italic", fontweight="normal", color=NEUTRAL
        )


def point_style(recipe: str, *, hollow: bool = False) -> dict[str, Any]:
    """BF16 is a ring, so that a point of another recipe on top of it leaves both in sight.

    Args:
        hollow: for the second kind of point in one figure: a head in FP8, or a prediction.
    """
    if hollow:
        filled = {"markerfacecolor": "white", "markeredgecolor": RECIPE_COLOURS[recipe], "markeredgewidth": 1.5}
        return point_style(recipe) | filled
    ring = recipe == "bf16"
    return {
        "color": RECIPE_COLOURS[recipe],
        "marker": RECIPE_MARKERS[recipe],
        "markersize": 10 if ring else 7.5,
        "markerfacecolor": "none" if ring else RECIPE_COLOURS[recipe],
        "markeredgecolor": RECIPE_COLOURS[recipe] if ring else "white",
        "markeredgewidth": 1.8 if ring else 0.5,
    }


def line_style(recipe: str) -> dict[str, Any]:
    """BF16 is a broad line under thin ones, for the same reason."""
    return {
        "color": RECIPE_COLOURS[recipe],
        "linewidth": 3.2 if recipe == "bf16" else 1.2,
        "alpha": 0.5 if recipe == "bf16" else 0.95,
    }


def plain_log_scale(axes: Axes) -> None:
    """Logarithmic, with numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def symmetric_limits(axes: Axes) -> None:
    """Zero in the middle, so that neither sign of a difference looks larger."""
    largest = max(abs(limit) for limit in axes.get_ylim())
    axes.set_ylim(-largest, largest)


def label(axes: Axes, text: str, x: float, y: float) -> None:
    """Write `text` beside a point, legible over lines."""
    axes.annotate(
        text,
        (x, y),
        xytext=(7, 4),
        textcoords="offset points",
        fontsize=9,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def recipes_at(runs: RunSet, size: str) -> list[str]:
    """Recipes that were trained at `size`, for a legend."""
    return [recipe for recipe in runs.recipes if runs.where(size=size, recipe=recipe)]
