"""Speed and memory, drawn.

From measurements on GPUs only (`fp8lab.analysis.occasions.speed_runs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fp8lab.analysis.occasions import SpeedRun
from fp8lab.analysis.timings import BUSY, fp8_only, speed_ratios
from fp8lab.figures.style import RECIPE_COLOURS, WIDTH, finish, point_style
from fp8lab.units import unique


def throughput(speeds: Sequence[SpeedRun]) -> Figure:
    """Tokens/s of each recipe over the fastest BF16's in the same process, by model, with 95% intervals.

    Heads in FP8 are hollow markers.
    """
    ratios = speed_ratios(speeds)
    settings = unique(ratios["setting"])
    timed = set(fp8_only(ratios)["recipe"])
    recipes = [recipe for recipe in RECIPE_COLOURS if recipe in timed]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.16 * len(settings) * max(2, len(recipes))))
    for recipe, rows, positions in _side_by_side(ratios, recipes, settings, share=0.8):
        colour = RECIPE_COLOURS[recipe]
        axes.hlines(positions, rows["interval_low"], rows["interval_high"], color=colour, linewidth=2)
        for ratio, position, head in zip(rows["ratio"], positions, rows["head"], strict=True):
            axes.plot(ratio, position, **point_style(recipe, hollow=head == "fp8") | {"markeredgecolor": colour})
    for boundary in range(1, len(settings)):
        axes.axhline(boundary - 0.5, color="#e6e6e6", linewidth=0.8)
    axes.axvline(1, color=RECIPE_COLOURS["bf16"], linewidth=1.2)
    axes.set_xlabel("tokens/s relative to BF16 (higher is faster)")
    _name_settings(axes, settings)
    finish(figure, axes, recipes, toy=False)
    return figure


def _side_by_side(
    table: pd.DataFrame, recipes: Sequence[str], settings: Sequence[str], *, share: float
) -> Iterator[tuple[str, pd.DataFrame, np.ndarray]]:
    """Each recipe's rows of `table`, and where they lie on an axis of `settings`: beside each other about a setting.

    Args:
        share: of the room between two settings, that all recipes take together.
    """
    for index, recipe in enumerate(recipes):
        rows = table[table["recipe"] == recipe]
        offset = (index - (len(recipes) - 1) / 2) * share / len(recipes)
        yield recipe, rows, np.array([settings.index(setting) for setting in rows["setting"]]) + offset


def _name_settings(axes: Axes, settings: Sequence[str]) -> None:
    """Settings down the vertical axis, the first on top."""
    parts = [setting.split(", ") for setting in settings]
    axes.set_yticks(range(len(settings)), [f"{', '.join(part[:2])}\n{', '.join(part[2:])}".strip() for part in parts])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def step_breakdown(milliseconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Where a step's time goes.

    Args:
        milliseconds: recipe -> category -> GPU milliseconds a step.
    """
    table = pd.DataFrame(milliseconds).T
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.42 * len(table)))
    left = np.zeros(len(table))
    for category, colour in zip(table.columns, sns.color_palette("mako", len(table.columns)), strict=True):
        widths = table[category].fillna(0).to_numpy()
        axes.barh(table.index, widths, left=left, color=colour, label=category)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("GPU time of one optimizer step (ms)")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.2)
    return figure


def roofline(table: pd.DataFrame) -> Figure:
    """Ratios measured (filled, with their 95% interval) against those predicted from bytes and FLOPs (hollow).

    Args:
        table: `timings.roofline_against_measurement` without BF16.
    """
    settings = unique(table["setting"])
    recipes = [recipe for recipe in RECIPE_COLOURS if recipe in set(table["recipe"])]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.26 * len(settings) * len(recipes)))
    for recipe, rows, positions in _side_by_side(table, recipes, settings, share=0.6):
        colour = RECIPE_COLOURS[recipe]
        axes.hlines(
            positions, rows["predicted_ratio"], rows["measured_ratio"], color=colour, linewidth=1, linestyle=":"
        )
        axes.hlines(positions, rows["interval_low"], rows["interval_high"], color=colour, linewidth=2)
        axes.plot(rows["measured_ratio"], positions, **point_style(recipe), linestyle="none")
        axes.plot(rows["predicted_ratio"], positions, **point_style(recipe, hollow=True), linestyle="none")
    axes.axvline(1, color=RECIPE_COLOURS["bf16"], linewidth=1.2)
    axes.set_xlabel("tokens/s relative to BF16")
    _name_settings(axes, settings)
    finish(figure, axes, recipes, toy=False)
    return figure


def break_even_map(table: pd.DataFrame) -> Figure:
    """Ratio to BF16 by width and tokens a micro-batch: hatched cells are predicted, plain ones measured.

    A star stands where the GPU waited for the host (`timings.BUSY`).

    Args:
        table: `timings.break_even` of one device.
    """
    recipes, tokens, widths = (unique(table[name]) for name in ("recipe", "tokens", "width"))
    figure, all_axes = plt.subplots(len(recipes), 1, figsize=(WIDTH, 0.7 + 1.25 * len(recipes)), squeeze=False)
    span = max(0.05, float(np.nanmax(np.abs(np.log(table[["predicted", "measured"]].to_numpy())))))
    scale = mpl.colors.Normalize(-span, span)
    for axes, recipe in zip(all_axes[:, 0], recipes, strict=True):
        for row in table[table["recipe"] == recipe].to_dict("records"):
            known = not np.isnan(row["measured"])
            value = row["measured"] if known else row["predicted"]
            left, bottom = widths.index(row["width"]) - 0.5, tokens.index(row["tokens"]) - 0.5
            colour = plt.get_cmap("BrBG")(scale(np.log(value)))
            cell = {"facecolor": colour, "hatch": "" if known else "///", "edgecolor": "white", "linewidth": 1.5}
            axes.add_patch(Rectangle((left, bottom), 1, 1, **cell))
            waits = "*" if row["busy"] < BUSY else ""
            label = f"{value:.2f}{waits}" if known else f"({value:.2f})"
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.2}
            axes.text(left + 0.5, bottom + 0.5, label, ha="center", va="center", fontsize=9, bbox=box)
        axes.set_xlim(-0.5, len(widths) - 0.5)
        axes.set_ylim(-0.5, len(tokens) - 0.5)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set_yticks(range(len(tokens)), [f"{count:,}" for count in tokens])
        axes.set_title(recipe)
        axes.grid(visible=False)
    all_axes[-1, 0].set_xlabel("width (d_model)")
    figure.supylabel("tokens a micro-batch", fontsize=9.5)
    return figure


def peak_memory(speeds: Sequence[SpeedRun]) -> Figure:
    """Peak allocated GPU memory of each recipe with its head in BF16, by model."""
    ratios = speed_ratios(speeds)
    settings = unique(ratios["setting"])
    recipes = [recipe for recipe in RECIPE_COLOURS if recipe in set(ratios["recipe"])]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.13 * len(settings) * len(recipes)))
    share = 0.8
    bf16_heads = ratios[ratios["head"] == "bf16"]
    for recipe, rows, positions in _side_by_side(bf16_heads, recipes, settings, share=share):
        height = 0.9 * share / len(recipes)
        axes.barh(positions, rows["peak_memory_bytes"] / 2**30, height, color=RECIPE_COLOURS[recipe])
    axes.set_xlabel("peak GPU memory (GiB)")
    _name_settings(axes, settings)
    finish(figure, axes, recipes, toy=False)
    return figure
