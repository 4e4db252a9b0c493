"""Records in, figure out.

One style, and one colour a precision in every figure (`RECIPE_COLOURS`, from Okabe and Ito's palette,
distinguishable with any common colour blindness). Every axis names its quantity and unit. Figures
drawn from the demo's runs carry 'toy scale, CPU' inside the picture, so that it travels with them.
Speed is drawn from measurements on GPUs only (`fp8lab.results.speed_runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from fp8lab import diagnosis, scaling, tables
from fp8lab.comparison import EQUIVALENCE_MARGIN, TARGET_HALF_WIDTH
from fp8lab.records import DataRecord
from fp8lab.results import Run, RunSet, SpeedRun, best_known_gaps, seed_deviation, unique
from fp8lab.scaling import JointLaw
from fp8lab.units import number
from fp8lab.variance import Line

RECIPE_COLOURS: dict[str, str] = {
    "bf16": "#0072B2",
    "tensorwise": "#D55E00",
    "rowwise": "#E69F00",
    "rowwise_with_gw_hp": "#CC79A7",
    "fused": "#009E73",
    "tensorwise_fast": "#8C3B00",
    "te_bf16": "#56B4E9",
    "te_current": "#7A7A7A",
    "te_delayed": "#000000",
    "nanochat": "#B8A200",
}
"""Colour of each precision; peers of the speed measurements have theirs too."""
RECIPE_MARKERS: dict[str, str] = dict(zip(RECIPE_COLOURS, "osD^vXP*ph", strict=True))
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


def loss_curves(runs: RunSet, size: str, band: float | None = None) -> Figure:
    """Training loss of every recipe at one size, and below it the difference to BF16 on the same tokens.

    Args:
        band: how far two runs part that differ in seed alone (nats/token), drawn around no difference.
    """
    return _with_difference(runs, size, _smoothed, "training loss", band=band)


def validation_curves(runs: RunSet, size: str, weights: Mapping[str, float], band: float | None = None) -> Figure:
    """Validation loss (mean of the domains by `weights`) during training, and its difference to BF16 below it."""
    return _with_difference(
        runs, size, lambda run: run.validation_curve(weights), "validation loss", marked=True, band=band
    )


def _with_difference(
    runs: RunSet,
    size: str,
    curve_of: Callable[[Run], pd.Series],
    quantity: str,
    *,
    marked: bool = False,
    band: float | None = None,
) -> Figure:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 4.6), sharex=True, height_ratios=(2, 1))
    baselines = {run.record.seed: curve_of(run) for run in runs.where(size=size, recipe="bf16")}
    for run in runs.where(size=size):
        curve = curve_of(run)
        style = _line_style(run.recipe) | (_point_style(run.recipe) if marked else {})
        top.plot(curve.index / 1e6, curve, **style)
        if run.recipe != "bf16" and run.record.seed in baselines:
            difference = (curve - baselines[run.record.seed]).dropna()
            bottom.plot(difference.index / 1e6, difference, **style)
    bottom.axhline(0, color=NEUTRAL, linewidth=0.8)
    if band is not None:
        bottom.axhspan(-band, band, color=SLATE, alpha=0.18, linewidth=0)
    top.set_ylabel(f"{quantity} (nats/token)")
    bottom.set_ylabel("FP8 − BF16\n(nats/token)")
    bottom.set_xlabel("training tokens (millions)")
    _symmetric_limits(bottom)
    figure.align_ylabels()
    _finish(figure, top, _recipes_at(runs, size), runs.toy)
    return figure


def _smoothed(run: Run, windows: int = 60) -> pd.Series:
    """Mean training loss over windows of steps, by tokens at the window's end."""
    metrics = run.metrics
    width = max(1, len(metrics) // windows)
    groups = np.arange(len(metrics)) // width
    return metrics.groupby(groups).agg({"tokens": "last", "loss": "mean"}).set_index("tokens")["loss"]


def loss_against_compute(runs: RunSet) -> Figure:
    """Every run's training curve against the FLOPs spent, with its final validation loss as a marker."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for run in runs.runs:
        curve = _smoothed(run)
        per_token = run.record.flops.per_token_matmul_attention_causal
        axes.plot(curve.index * per_token, curve, **_line_style(run.recipe))
        axes.plot(run.record.flops.total, run.validation_loss, **_point_style(run.recipe))
    for size in runs.sizes:
        last = runs.where(size=size)[0]
        _label(axes, size, last.record.flops.total, last.validation_loss)
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel("loss (nats/token)")
    _finish(figure, axes, runs.recipes, runs.toy)
    return figure


def scaling_panels(runs: RunSet, law: JointLaw | None = None) -> Figure:
    """Loss against compute, against parameters and against tokens, one panel below the other.

    Curves are training losses; markers are final validation losses, small ones those of decay branches. The frontier
    of each precision is the lower convex hull of its markers. Lines through markers are `law`, or power laws where
    there is none.
    """
    figure, (compute, parameters, tokens) = plt.subplots(3, 1, figsize=(WIDTH, 9.6), height_ratios=(1.25, 1, 1))
    points = tables.final_losses(runs)
    for axes in figure.axes:
        _log_log(axes)
    for axes in (parameters, tokens):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    _compute_panel(compute, runs, points)
    _parameters_panel(parameters, points, law)
    _tokens_panel(tokens, points, law)
    _finish(figure, compute, runs.recipes, runs.toy)
    return figure


def _compute_panel(axes: Axes, runs: RunSet, points: pd.DataFrame) -> None:
    for run in (*runs.runs, *runs.branches):
        curve = _smoothed(run)
        per_token = run.record.flops.per_token_matmul_attention_causal
        axes.plot(curve.index * per_token, curve, **_line_style(run.recipe) | {"linewidth": 0.8, "alpha": 0.35})
    for recipe in runs.recipes:
        of_recipe = points[points["recipe"] == recipe]
        efficient = of_recipe.iloc[scaling.frontier(of_recipe["flops_causal"], of_recipe["loss"])]
        if len(efficient) > 1:
            axes.plot(efficient["flops_causal"], efficient["loss"], **_line_style(recipe))
    _plot_points(axes, points, "flops_causal")
    _label_sizes(axes, points, "flops_causal")
    # What lies above and to the left is the first steps, which no frontier needs.
    axes.set_ylim(points["loss"].min() - 0.12, points["loss"].max() + 0.75)
    axes.set_xlim(points["flops_causal"].min() / 4, points["flops_causal"].max() * 3)
    axes.set_title("against compute")
    axes.set_xlabel("training compute (FLOPs)")


def _parameters_panel(axes: Axes, points: pd.DataFrame, law: JointLaw | None) -> None:
    _plot_points(axes, points, "parameters")
    for _, group in points.groupby(["recipe", "budget"], sort=False):
        recipe, budget = str(group["recipe"].iloc[0]), float(group["budget"].iloc[0])
        if group["size"].nunique() < 2 or (law and not law.covers(recipe)):
            continue
        n = np.geomspace(group["parameters"].min(), group["parameters"].max(), 40)
        line = law(n, budget * n, recipe) if law else scaling.fit_power_law(group["parameters"], group["loss"])(n)
        axes.plot(n, line, color=RECIPE_COLOURS[recipe], linewidth=0.9, alpha=0.7)
    for _, group in points.groupby("budget"):
        last = group.iloc[int(group["parameters"].to_numpy().argmax())]
        _label(axes, f"{last['budget']:g} tokens/N", last["parameters"], last["loss"])
    axes.set_xlim(points["parameters"].min() / 1.4, points["parameters"].max() * 2.4)
    axes.set_title("against parameters")
    axes.set_xlabel("parameters N (embedding included once)")


def _tokens_panel(axes: Axes, points: pd.DataFrame, law: JointLaw | None) -> None:
    _plot_points(axes, points, "tokens")
    for _, group in points.groupby(["size", "recipe"], sort=False):
        recipe, n = str(group["recipe"].iloc[0]), float(group["parameters"].iloc[0])
        if law is None or not law.covers(recipe) or group["tokens"].nunique() < 2:
            continue
        d = np.geomspace(group["tokens"].min(), group["tokens"].max(), 40)
        axes.plot(d, law(n, d, recipe), color=RECIPE_COLOURS[recipe], linewidth=0.9, alpha=0.7)
    _label_sizes(axes, points, "tokens")
    axes.set_xlim(points["tokens"].min() / 1.4, points["tokens"].max() * 2)
    axes.set_title("against tokens")
    axes.set_xlabel("training tokens D")


def _plot_points(axes: Axes, points: pd.DataFrame, x: str) -> None:
    """A marker a final loss; BF16's rings first, under the others."""
    for recipe in sorted(points["recipe"].unique(), key=list(RECIPE_COLOURS).index):
        for is_branch, scale in ((True, 0.6), (False, 0.85)):
            rows = points[(points["recipe"] == recipe) & (points["is_branch"] == is_branch)]
            style = _point_style(recipe)
            style |= {"markersize": style["markersize"] * scale, "linestyle": "none"}
            axes.plot(rows[x], rows["loss"], **style)


def _label_sizes(axes: Axes, points: pd.DataFrame, x: str) -> None:
    """The name of each size beside its longest run."""
    for size, group in points.groupby("size", sort=False):
        last = group.iloc[int(group["tokens"].to_numpy().argmax())]
        _label(axes, str(size), last[x], last["loss"])


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(7, 4),
        textcoords="offset points",
        fontsize=9,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _log_log(axes: Axes) -> None:
    """Logarithmic axes, losses written out."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss (nats/token)")


def extrapolation(points: pd.DataFrame, law: JointLaw, draws: Sequence[JointLaw], beyond: pd.DataFrame) -> Figure:
    """Loss against parameters at one budget: measured, fitted, and dashed where nothing was measured.

    Args:
        points: BF16's final losses at this budget.
        draws: refits of `law`, for the band.
        beyond: `tables.extrapolated`.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    budget = beyond["tokens"].iloc[0] / beyond["parameters"].iloc[0]
    measured, last = beyond["parameters"].iloc[0], beyond["parameters"].iloc[-1]
    inside = np.geomspace(points["parameters"].min(), measured, 40)
    outside = np.geomspace(measured, last, 60)
    colour = RECIPE_COLOURS["bf16"]
    band = np.quantile([drawn(outside, budget * outside) for drawn in draws], (0.025, 0.975), axis=0)
    axes.axvspan(measured, last * 1.2, color="#f4f4f4", zorder=-1, linewidth=0)
    axes.plot(points["parameters"], points["loss"], linestyle="none", label="measured", **_point_style("bf16"))
    axes.plot(inside, law(inside, budget * inside), color=colour, label="fitted")
    axes.plot(outside, law(outside, budget * outside), color=colour, linestyle="--", label="extrapolated")
    axes.fill_between(outside, *band, color=colour, alpha=0.15, linewidth=0, label="its 95% interval")
    for name, style in zip(scaling.PUBLISHED, (":", "-.", (0, (6, 2, 1, 2, 1, 2))), strict=True):
        shape = beyond["loss"].iloc[0] - beyond[name]
        axes.plot(beyond["parameters"], shape, color=NEUTRAL, linewidth=1.1, linestyle=style, label=name)
    for size, n in zip(beyond["size"].iloc[1:], beyond["parameters"].iloc[1:], strict=True):
        axes.axvline(n, color="#d0d0d0", linewidth=0.8, zorder=0)
        axes.annotate(
            size,
            (n, 1),
            xytext=(-2, -4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="top",
            rotation=90,
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_xlim(points["parameters"].min() / 1.3, last * 1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"parameters N, at {budget:g} tokens a parameter")
    axes.set_ylabel("validation loss (nats/token)")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=2.6)
    return figure


def loss_gaps(*sets: RunSet) -> Figure:
    """Validation loss of each FP8 recipe minus BF16's, by size, from the plan with the most seeds of it.

    A solid bar is an interval over seeds; a dashed one is what single runs may differ by if they scatter as smaller
    models do.
    """
    gaps = best_known_gaps(*sets)
    sizes, recipes = unique(size for size, _ in gaps), unique(recipe for _, recipe in gaps)
    parameters = {run.size: run.parameters for runs in sets for run in runs.runs}
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    axes.axhspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color=SLATE, alpha=0.12, linewidth=0)
    for (size, recipe), gap in gaps.items():
        position = sizes.index(size) + (recipes.index(recipe) - (len(recipes) - 1) / 2) * 0.12
        axes.plot(position, gap.mean, linestyle="none", **_point_style(recipe))
        assumed = seed_deviation(sets, below=parameters[size])
        if gap.interval is not None:
            axes.vlines(position, *gap.interval, color=RECIPE_COLOURS[recipe], linewidth=2)
        elif assumed is not None:
            low, high = gap.assumed_interval(assumed)
            axes.vlines(position, low, high, color=RECIPE_COLOURS[recipe], linewidth=1, linestyle=(0, (2, 2)))
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xlabel("model (parameters N)")
    axes.set_ylabel("FP8 − BF16,\nvalidation (nats/token)")
    _symmetric_limits(axes)
    _finish(figure, axes, recipes, sets[0].toy)
    return figure


def gaps_by_domain(runs: RunSet, size: str) -> Figure:
    """Difference to BF16 in each domain's bits per byte at one size: mean over seeds, with its interval."""
    gaps = tables.domain_gaps(runs, size)
    domains, recipes = unique(domain for domain, _ in gaps), unique(recipe for _, recipe in gaps)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    height = 0.8 / len(recipes)
    for (domain, recipe), gap in gaps.items():
        position = domains.index(domain) + (recipes.index(recipe) - (len(recipes) - 1) / 2) * height
        axes.barh(position, gap.mean, height * 0.9, color=RECIPE_COLOURS[recipe])
        if gap.interval is not None:
            axes.hlines(position, *gap.interval, color=NEUTRAL, linewidth=1.2)
    axes.set_yticks(np.arange(len(domains)), domains)
    axes.invert_yaxis()
    axes.axvline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_xlabel("FP8 − BF16, validation (bits/byte)")
    axes.grid(axis="y", visible=False)
    _finish(figure, axes, recipes, runs.toy)
    return figure


LINE_COLOURS = dict(
    zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A", "#8C3B00"),
        "osD^vXP*p",
        strict=True,
    )
)
"""For lines that are no precisions, each with its marker."""


def pairs_needed(lines: Mapping[str, Line], toy: bool) -> Figure:
    """Half-width of the interval of FP8 minus BF16 against the number of pairs, a line a design or size.

    Bands are what so few runs know of the scatter; a marker is what was run.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.9))
    pairs = np.unique(np.geomspace(2, 300, 80).round())
    handles = []
    for (name, line), (colour, marker) in zip(lines.items(), LINE_COLOURS.items(), strict=False):
        design = line.design
        low, high = (np.array([design.half_width(n, end) for n in pairs]) for end in design.deviation.interval)
        axes.fill_between(pairs, low, high, color=colour, alpha=0.10, linewidth=0)
        axes.plot(pairs, [design.half_width(n) for n in pairs], color=colour)
        axes.plot(line.seeds, design.half_width(line.seeds), marker, color=colour)
        handles.append(Line2D([], [], color=colour, marker=marker, label=name))
    for half_width in (TARGET_HALF_WIDTH, EQUIVALENCE_MARGIN):
        axes.axhline(half_width, color=NEUTRAL, linestyle="--", linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(pairs[0] * 0.95, pairs[-1])
    ends = [line.design.half_width(n) for line in lines.values() for n in (pairs[0], pairs[-1])]
    axes.set_ylim(max(min(ends) / 1.5, 2e-4), min(max(ends), 0.3))
    axes.set_xlabel("runs of each recipe")
    axes.set_ylabel("half-width of the 95% interval\n(nats/token)")
    figure.legend(handles=handles, loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=1.8)
    _finish(figure, axes, [], toy)
    return figure


def gradient_norms(runs: RunSet, size: str) -> Figure:
    """Gradient norm of every recipe at one size; skipped steps are marked on the axis."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    for run in runs.where(size=size):
        metrics = run.metrics
        axes.plot(metrics["tokens"] / 1e6, metrics["grad_norm"], **_line_style(run.recipe))
        skipped = metrics[metrics["skipped"].astype(bool)]
        axes.plot(
            skipped["tokens"] / 1e6,
            np.zeros(len(skipped)),
            "x",
            color=RECIPE_COLOURS[run.recipe],
            transform=axes.get_xaxis_transform(),
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("gradient norm (L2)")
    _finish(figure, axes, _recipes_at(runs, size), runs.toy)
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
    _mark_toy(figure, toy)
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
            _plain_log_scale(axes)
        column[0].set_title(run.recipe.replace("_with", "\n_with"))
        column[1].set_xlabel("step")
        column[1].xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    grid[0, 0].set_ylabel("amax of down's input")
    grid[1, 0].set_ylabel("its kurtosis\n(3: Gaussian)")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(1, blocks[-1])), "viridis")
    bar = figure.colorbar(scale, ax=list(grid.flat), location="bottom", label="block", aspect=40, fraction=0.05)
    bar.ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    _mark_toy(figure, toy)
    return figure


def _plain_log_scale(axes: Axes) -> None:
    """Logarithmic, with numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_toy(figure: Figure, toy: bool) -> None:
    """'toy scale, CPU' above panels that have titles of their own."""
    if toy:
        figure.suptitle(
            "toy scale, CPU", x=0.99, ha="right", fontsize=9, fontstyle="italic", fontweight="normal", color=NEUTRAL
        )


def activation_kurtosis(runs: Sequence[Run], toy: bool) -> Figure:
    """Kurtosis of each kind of Linear's input over steps: the largest of all blocks, a colour a recipe."""
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH, 3.9), sharex=True)
    for axes, kind in zip(grid.flat, diagnosis.KINDS, strict=True):
        for run in runs:
            table = diagnosis.health(run)
            table = table[(table["kind"] == kind) & (table["tensor"] == "input")]
            largest = table.groupby("step")["kurtosis"].max()
            axes.plot(largest.index, largest, **_line_style(run.recipe))
        _plain_log_scale(axes)
        axes.set_title(kind.rpartition(".")[2])
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    for axes in grid[1]:
        axes.set_xlabel("step")
    figure.supylabel("kurtosis of the input (largest of all blocks)", fontsize=9.5)
    _mark_toy(figure, toy)
    _finish(figure, grid[0, 0], [run.recipe for run in runs], toy=False)
    return figure


def data_composition(record: DataRecord, toy: bool) -> Figure:
    """Training tokens that each domain has, beside the share of them that the mixture's weights ask for."""
    composition = tables.data_composition(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), sharey=True)
    left.barh(composition["domain"], composition["train_tokens"] / 1e6, color=SLATE)
    right.barh(composition["domain"], composition["weight"], color=SLATE)
    left.invert_yaxis()
    left.set_xlabel("unique training tokens\n(millions)")
    right.set_xlabel("share of each batch")
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    _finish(figure, right, [], toy)
    return figure


def benchmark_scores(runs: RunSet) -> Figure:
    """Accuracy of every scored run by task, in its usual metric, with lm-eval's standard error and the random guess."""
    scores = tables.scores(runs)
    scores = scores[scores["metric"] == scores["task"].map(tables.usual_metric)]
    tasks = unique(scores["task"])
    figure, grid = plt.subplots(
        len(tasks), 1, figsize=(WIDTH, 0.7 + len(tasks) * (0.35 + 0.22 * len(runs.sizes))), sharex=True, squeeze=False
    )
    for axes, task in zip(grid[:, 0], tasks, strict=True):
        _task_scores(axes, scores[scores["task"] == task], runs)
    grid[-1, 0].set_xlabel("accuracy")
    grid[-1, 0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(figure, grid[0, 0], unique(scores["recipe"]), runs.toy)
    return figure


def _task_scores(axes: Axes, scores: pd.DataFrame, runs: RunSet) -> None:
    for _, row in scores.iterrows():
        offset = (runs.recipes.index(row["recipe"]) - (len(runs.recipes) - 1) / 2) * 0.16
        axes.errorbar(
            row["value"],
            runs.sizes.index(row["size"]) + offset,
            xerr=row["stderr"],
            color=RECIPE_COLOURS[row["recipe"]],
            marker=RECIPE_MARKERS[row["recipe"]],
            markersize=5,
            linewidth=1.2,
        )
    guess = scores["random_guess"].iloc[0]
    if guess == guess:
        axes.axvline(guess, color=NEUTRAL, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(runs.sizes)), runs.sizes)
    axes.set_ylim(len(runs.sizes) - 0.5, -0.5)
    axes.set_title(f"{scores['task'].iloc[0]} ({scores['metric'].iloc[0]})")
    axes.grid(axis="y", visible=False)


def throughput(speeds: Sequence[SpeedRun]) -> Figure:
    """Tokens/s of each recipe over BF16's in the same process, by model: median and range over rounds.

    Heads in FP8 are hollow markers.
    """
    ratios = tables.speed_ratios(speeds)
    settings = unique(ratios["setting"])
    recipes = [recipe for recipe in RECIPE_COLOURS if recipe in set(ratios["recipe"]) and recipe != "bf16"]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.16 * len(settings) * max(2, len(recipes))))
    for index, recipe in enumerate(recipes):
        offset = (index - (len(recipes) - 1) / 2) * 0.8 / len(recipes)
        rows = ratios[ratios["recipe"] == recipe]
        positions = np.array([settings.index(setting) for setting in rows["setting"]]) + offset
        axes.hlines(positions, rows["low"], rows["high"], color=RECIPE_COLOURS[recipe], linewidth=2)
        for ratio, position, head in zip(rows["ratio"], positions, rows["head"], strict=True):
            style = _point_style(recipe) | (
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
    _finish(figure, axes, recipes, toy=False)
    return figure


CHART_PANELS = {
    "speed": ("Speed of FP8 against BF16", "width (d_model)", "tokens/s, × BF16", 1.0),
    "loss": ("Loss of every run against BF16", "parameters N", "loss − BF16 (nats/token)", 0.0),
}
"""Panels of the first page's chart: title, axes, and BF16's place on the second."""


def switch_chart(points: pd.DataFrame, toy: bool) -> Figure:
    """Timed settings by width, and trained runs by size, against BF16: what `switch_chart_spec` makes interactive.

    Args:
        points: `decision.chart_points`.
        toy: whether the trained runs are the demo's.
    """
    panels = [panel for panel in CHART_PANELS if panel in set(points["panel"])]
    figure, grid = plt.subplots(len(panels), 1, figsize=(WIDTH, 0.6 + 2.7 * len(panels)), squeeze=False)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        rows = points[points["panel"] == panel]
        _, label, quantity, reference = CHART_PANELS[panel]
        recipes = [recipe for recipe in RECIPE_COLOURS if recipe in set(rows["series"])]
        for index, recipe in enumerate(recipes):
            offset = 1.035 ** (index - (len(recipes) - 1) / 2)
            for _, row in rows[rows["series"] == recipe].iterrows():
                style = _point_style(recipe) | {"markersize": 6.5}
                if row["hollow"]:
                    style |= {
                        "markerfacecolor": "white",
                        "markeredgecolor": RECIPE_COLOURS[recipe],
                        "markeredgewidth": 1.5,
                    }
                axes.vlines(row["x"] * offset, row["low"], row["high"], color=RECIPE_COLOURS[recipe], linewidth=2)
                axes.plot(row["x"] * offset, row["y"], linestyle="none", **style)
        axes.axhline(reference, color=RECIPE_COLOURS["bf16"], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlim(rows["x"].min() / 1.3, rows["x"].max() * 1.3)
        axes.set_xticks(*zip(*_chart_ticks(rows), strict=True))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_xlabel(label)
        axes.set_ylabel(quantity)
    shown = [recipe for recipe in RECIPE_COLOURS if recipe in set(points["series"])]
    _finish(figure, grid[-1, 0], shown, toy and "loss" in panels)
    return figure


def _chart_ticks(rows: pd.DataFrame) -> list[tuple[float, str]]:
    """The widths or sizes themselves, but for those that would run into the one before."""
    names = dict(sorted(zip(rows["x"], rows["tick"], strict=True)))
    room = max(1.18, (max(names) / min(names)) ** 0.09)
    ticks: list[tuple[float, str]] = []
    for value, name in names.items():
        if not ticks or value / ticks[-1][0] > room:
            ticks.append((value, name))
    return ticks


def switch_chart_spec(points: pd.DataFrame, toy: bool, label: str) -> dict[str, Any]:
    """The same for `publish.chart`, whose reader chooses recipes and sees the facts of each record.

    Args:
        label: of the figure that `switch_chart` is displayed as.
    """
    panels = []
    for panel, (title, x_label, quantity, reference) in CHART_PANELS.items():
        rows = points[points["panel"] == panel]
        if rows.empty:
            continue
        drawn = [
            {
                "series": row["series"],
                "hollow": bool(row["hollow"]),
                **{
                    axis: None if row[axis] != row[axis] else round(float(row[axis]), 6)
                    for axis in ("x", "y", "low", "high")
                },
                "title": row["title"],
                "facts": list(row["facts"].items()),
            }
            for _, row in rows.iterrows()
        ]
        panels.append(
            {
                "title": title + (" (toy scale, CPU)" if toy and panel == "loss" else ""),
                "x": {"label": x_label, "ticks": _chart_ticks(rows)},
                "y": {"label": quantity, "reference": reference},
                "points": drawn,
            }
        )
    series = [
        {"name": recipe, "colour": RECIPE_COLOURS[recipe], "marker": RECIPE_MARKERS[recipe]}
        for recipe in RECIPE_COLOURS
        if recipe in set(points["series"])
    ]
    return {"figure": f"fig-{label}", "series": series, "panels": panels}


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
        table: `tables.roofline_against_measurement` without BF16.
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
        axes.plot(rows["measured_ratio"], positions, **_point_style(recipe), linestyle="none")
        hollow = _point_style(recipe) | {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.5}
        axes.plot(rows["predicted_ratio"], positions, **hollow, linestyle="none")
    axes.axvline(1, color=RECIPE_COLOURS["bf16"], linewidth=1.2)
    axes.set_yticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel("tokens/s relative to BF16")
    axes.grid(axis="y", visible=False)
    _finish(figure, axes, recipes, toy=False)
    return figure


def break_even_map(table: pd.DataFrame) -> Figure:
    """Ratio to BF16 by width and tokens a micro-batch: hatched cells are predicted, plain ones measured.

    Args:
        table: `tables.break_even` of one device.
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
    ratios = tables.speed_ratios(speeds)
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
    _finish(figure, axes, recipes, toy=False)
    return figure


def _recipes_at(runs: RunSet, size: str) -> list[str]:
    return [recipe for recipe in runs.recipes if runs.where(size=size, recipe=recipe)]


def _finish(figure: Figure, axes: Axes, recipes: Sequence[str], toy: bool) -> None:
    """Add the legend of `recipes` above everything and, for the demo's runs, 'toy scale, CPU' above `axes`."""
    if recipes:
        handles = [
            Line2D([], [], label=recipe, **_point_style(recipe), linestyle="-")
            for recipe in sorted(recipes, key=list(RECIPE_COLOURS).index)
        ]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.4, handlelength=1.6
        )
    if toy:
        axes.set_title(
            "toy scale, CPU", loc="right", fontsize=9, fontstyle="italic", fontweight="normal", color=NEUTRAL
        )


def _point_style(recipe: str) -> dict[str, Any]:
    """BF16 is a ring, so that a point of another recipe on top of it leaves both in sight."""
    ring = recipe == "bf16"
    return {
        "color": RECIPE_COLOURS[recipe],
        "marker": RECIPE_MARKERS[recipe],
        "markersize": 10 if ring else 7.5,
        "markerfacecolor": "none" if ring else RECIPE_COLOURS[recipe],
        "markeredgecolor": RECIPE_COLOURS[recipe] if ring else "white",
        "markeredgewidth": 1.8 if ring else 0.5,
    }


def _line_style(recipe: str) -> dict[str, Any]:
    """BF16 is a broad line under thin ones, for the same reason."""
    return {
        "color": RECIPE_COLOURS[recipe],
        "linewidth": 3.2 if recipe == "bf16" else 1.2,
        "alpha": 0.5 if recipe == "bf16" else 0.95,
    }


def _symmetric_limits(axes: Axes) -> None:
    """Zero in the middle, so that neither sign of a difference looks larger."""
    largest = max(abs(limit) for limit in axes.get_ylim())
    axes.set_ylim(-largest, largest)
