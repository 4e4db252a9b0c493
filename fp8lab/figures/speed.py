"""Speed and memory, drawn.

From measurements on GPUs only (`fp8lab.results.speed_runs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fp8lab.figures.style import RECIPE_COLOURS, WIDTH, finish, point_style
from fp8lab.results import SpeedRun, unique
from fp8lab.timings import fp8_only, speed_ratios


def throughput(speeds: Sequence[SpeedRun]) -> Figure:
    """Tokens/s of each recipe over the fastest BF16's in the same process, by model, with 95% intervals.

    Heads in FP8 are hollow markers.
    """
    ratios = speed_ratios(speeds)
    settings = unique(ratios["setting"])
    timed = set(fp8_only(ratios)["recipe"])
    recipes = [recipe for recipe in RECIPE_COLOURS if recipe in timed]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.16 * len(settings) * max(2, len(recipes))))
    for index, recipe in enumerate(recipes):
        offset = (index - (len(recipes) - 1) / 2) * 0.8 / len(recipes)
        rows = ratios[ratios["recipe"] == recipe]
        positions = np.array([settings.index(setting) for setting in rows["setting"]]) + offset
        axes.hlines(positions, rows["interval_low"], rows["interval_high"], color=RECIPE_COLOURS[recipe], linewidth=2)
        for ratio, position, head in zip(rows["ratio"], positions, rows["head"], strict=True):
            style = point_style(recipe) | (
                {"markerfacecolor": "white", "markeredgewidth": 1.5} if head == "fp8" else {}
            )
            axes.plot(ratio, position, **style | {"markeredgecolor": RECIPE_COLOURS[recipe]})
    for boundary in range(1, len(settings)):
        axes.axhline(boundary - 0.5, color="#e6e6e6", linewidth=0.8)
    axes.axvline(1, color=RECIPE_COLOURS["bf16"], linewidth=1.2)
    axes.set_yticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel("tokens/s relative to BF16 (higher is faster)")
    axes.grid(axis="y", visible=False)
    finish(figure, axes, recipes, toy=False)
    return figure


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
    for index, recipe in enumerate(recipes):
        rows = table[table["recipe"] == recipe]
        offset = (index - (len(recipes) - 1) / 2) * 0.6 / len(recipes)
        positions = np.array([settings.index(setting) for setting in rows["setting"]]) + offset
        colour = RECIPE_COLOURS[recipe]
        axes.hlines(
            positions, rows["predicted_ratio"], rows["measured_ratio"], color=colour, linewidth=1, linestyle=":"
        )
        axes.hlines(positions, rows["interval_low"], rows["interval_high"], color=colour, linewidth=2)
        axes.plot(rows["measured_ratio"], positions, **point_style(recipe), linestyle="none")
        hollow = point_style(recipe) | {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.5}
        axes.plot(rows["predicted_ratio"], positions, **hollow, linestyle="none")
    axes.axvline(1, color=RECIPE_COLOURS["bf16"], linewidth=1.2)
    axes.set_yticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel("tokens/s relative to BF16")
    axes.grid(axis="y", visible=False)
    finish(figure, axes, recipes, toy=False)
    return figure


def break_even_map(table: pd.DataFrame) -> Figure:
    """Ratio to BF16 by width and tokens a micro-batch: hatched cells are predicted, plain ones measured.

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
            label = f"{value:.2f}" if known else f"({value:.2f})"
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
    height = 0.8 / len(recipes)
    for index, recipe in enumerate(recipes):
        rows = ratios[(ratios["recipe"] == recipe) & (ratios["head"] == "bf16")]
        offset = (index - (len(recipes) - 1) / 2) * height
        positions = np.array([settings.index(setting) for setting in rows["setting"]]) + offset
        axes.barh(positions, rows["peak_memory_bytes"] / 2**30, height * 0.9, color=RECIPE_COLOURS[recipe])
    axes.set_yticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings])
    axes.invert_yaxis()
    axes.set_xlabel("peak GPU memory (GiB)")
    axes.grid(axis="y", visible=False)
    finish(figure, axes, recipes, toy=False)
    return figure
