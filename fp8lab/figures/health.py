"""Signs of trouble, drawn: gradient norms, and what rounding does to the operands of GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from fp8lab.analysis import diagnosis
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.figures.style import RECIPE_COLOURS, WIDTH, finish, line_style, mark_toy, plain_log_scale, recipes_at
from fp8lab.units import number, unique


def gradient_norms(runs: RunSet, size: str) -> Figure:
    """Gradient norm of every recipe at one size; skipped steps are marked on the axis."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    for run in runs.where(size=size):
        metrics = run.metrics
        axes.plot(metrics["tokens"] / 1e6, metrics["grad_norm"], **line_style(run.recipe))
        skipped = metrics[metrics["skipped"].astype(bool)]
        axes.plot(
            skipped["tokens"] / 1e6,
            np.zeros(len(skipped)),
            "x",
            color=RECIPE_COLOURS[run.recipe],
            transform=axes.get_xaxis_transform(),
        )
    plain_log_scale(axes)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("gradient norm (L2)")
    finish(figure, axes, recipes_at(runs, size), runs.toy)
    return figure


def health_map(run: Run, quantity: str, toy: bool) -> Figure:
    """Every Linear's `quantity` by step, one panel an operand; a row a Linear, the first block uppermost.

    Args:
        quantity: 'underflow_fraction', or 'growth' (amax over that of the first measurement).
    """
    table = diagnosis.amax_growth(run)
    operands = [operand for operand in diagnosis.OPERANDS if operand in set(table["tensor"])]
    layers = unique(table["layer"])
    colours, norm, label = _health_scale(quantity, table)
    figure, grid = plt.subplots(
        1, len(operands), figsize=(WIDTH, 1.9 + 0.11 * max(12, len(layers))), sharey=True, squeeze=False
    )
    for axes, operand in zip(grid[0], operands, strict=True):
        values = table[table["tensor"] == operand].pivot_table(index="layer", columns="step", values=quantity)
        steps = np.asarray(values.columns, float)
        width = steps[0] if len(steps) == 1 else steps[1] - steps[0]
        mesh = axes.pcolormesh(
            np.append(steps - width, steps[-1]),
            np.arange(len(layers) + 1),
            values.reindex(layers).to_numpy(float),
            cmap=colours,
            norm=norm,
            rasterized=True,
        )
        axes.set_title(operand)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    _label_kinds(grid[0, 0], table)
    grid[0, len(operands) // 2].set_xlabel("step")
    bar = figure.colorbar(mesh, ax=list(grid[0]), location="bottom", label=label, aspect=40, fraction=0.05)
    if quantity == "growth":
        bar.ax.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        bar.ax.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
        )
        bar.ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    mark_toy(figure, toy)
    return figure


def _health_scale(quantity: str, table: pd.DataFrame) -> tuple[str, mpl.colors.Normalize, str]:
    """Colour map, its norm and its label."""
    if quantity == "growth":
        values = np.log2(table[quantity].replace([0, np.inf], np.nan)).abs()
        largest = 2 ** max(1.0, np.ceil(values.max()))
        label = "amax / amax at the first measurement"
        return "RdBu_r", mpl.colors.LogNorm(1 / largest, largest), label
    return "viridis", mpl.colors.SymLogNorm(1e-6, vmin=0, vmax=1), "nonzero values that become zero (share)"


def _label_kinds(axes: Axes, table: pd.DataFrame) -> None:
    """Name each group of rows by the Linear that they are, and draw a line between groups."""
    kinds = table.drop_duplicates("layer")["kind"].astype(str).to_list()
    starts = [kinds.index(kind) for kind in unique(kinds)]
    ends = [*starts[1:], len(kinds)]
    centres = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_yticks(centres, [kind.rpartition(".")[2] for kind in unique(kinds)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("Linear, blocks downwards")
    axes.invert_yaxis()
    for other in axes.figure.axes:
        for start in starts[1:]:
            other.axhline(start, color="white", linewidth=1.5)


def swiglu_outliers(runs: Sequence[Run], toy: bool) -> Figure:
    """Amax and kurtosis of what `down` reads, SwiGLU's output, by block: a column a run."""
    figure, grid = plt.subplots(2, len(runs), figsize=(WIDTH, 4.2), sharex=True, sharey="row", squeeze=False)
    for column, run in zip(grid.T, runs, strict=True):
        table = diagnosis.health(run)
        table = table[(table["kind"] == "mlp.down") & (table["tensor"] == "input")]
        blocks = sorted(table["block"].unique())
        for block in blocks:
            curve = table[table["block"] == block]
            colour = mpl.colormaps["viridis"](block / max(1, blocks[-1]))
            for axes, quantity in zip(column, ("amax", "kurtosis"), strict=True):
                axes.plot(curve["step"], curve[quantity], color=colour, linewidth=1.3)
        for axes in column:
            plain_log_scale(axes)
        column[0].set_title(run.recipe.replace("_with", "\n_with"))
        column[1].set_xlabel("step")
        column[1].xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    grid[0, 0].set_ylabel("amax of down's input")
    grid[1, 0].set_ylabel("its kurtosis\n(3: Gaussian)")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(1, blocks[-1])), "viridis")
    bar = figure.colorbar(scale, ax=list(grid.flat), location="bottom", label="block", aspect=40, fraction=0.05)
    bar.ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    mark_toy(figure, toy)
    return figure


def activation_kurtosis(runs: Sequence[Run], toy: bool) -> Figure:
    """Kurtosis of each kind of Linear's input over steps: the largest of all blocks, a colour a recipe."""
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH, 3.9), sharex=True)
    for axes, kind in zip(grid.flat, diagnosis.KINDS, strict=True):
        for run in runs:
            table = diagnosis.health(run)
            table = table[(table["kind"] == kind) & (table["tensor"] == "input")]
            largest = table.groupby("step")["kurtosis"].max()
            axes.plot(largest.index, largest, **line_style(run.recipe))
        plain_log_scale(axes)
        axes.set_title(kind.rpartition(".")[2])
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    for axes in grid[1]:
        axes.set_xlabel("step")
    figure.supylabel("kurtosis of the input (largest of all blocks)", fontsize=9.5)
    mark_toy(figure, toy)
    finish(figure, grid[0, 0], [run.recipe for run in runs], toy=False)
    return figure
