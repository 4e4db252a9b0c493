"""Losses drawn: curves, gaps to BF16, and how many runs a claim about them needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fp8lab.analysis.comparison import EQUIVALENCE_MARGIN, TARGET_HALF_WIDTH
from fp8lab.analysis.diagnosis import flushed_gradients
from fp8lab.analysis.losses import MeasuredGap, domain_gaps
from fp8lab.analysis.runs import Run, RunSet
from fp8lab.analysis.starts import Start
from fp8lab.analysis.variance import Line
from fp8lab.figures.style import (
    NEUTRAL,
    RECIPE_COLOURS,
    SLATE,
    WIDTH,
    finish,
    line_style,
    point_style,
    recipes_at,
    symmetric_limits,
)
from fp8lab.units import unique


def loss_curves(runs: RunSet, size: str, band: float | None = None) -> Figure:
    """Training loss of every recipe at one size, and below it the difference to BF16 on the same tokens.

    The difference is drawn to the scale of what follows the first tenth of the tokens: a model's first steps may part
    by nats, beside which nothing later would show.

    Args:
        band: as in `validation_curves`.
    """
    return _with_difference(runs, size, Run.training_curve, "training loss", band=band)


def validation_curves(runs: RunSet, size: str, weights: Mapping[str, float], band: float | None = None) -> Figure:
    """Validation loss (mean of the domains by `weights`) during training, and its difference to BF16 below it.

    Args:
        band: how far the final losses of two runs part that differ in seed alone (nats/token): a bar at the end, around
            no difference.
    """
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
    parted: list[float] = []
    for run in runs.where(size=size):
        curve = curve_of(run)
        style = line_style(run.recipe) | (point_style(run.recipe) if marked else {})
        top.plot(curve.index / 1e6, curve, **style)
        if run.recipe != "bf16" and run.record.seed in baselines:
            difference = (curve - baselines[run.record.seed]).dropna()
            bottom.plot(difference.index / 1e6, difference, **style)
            first = 0 if marked else difference.index.max() / 10
            parted += list(difference[difference.index > first].abs())
    if band is not None:
        end = max(run.record.tokens for run in runs.where(size=size)) / 1e6
        bottom.vlines(end, -band, band, color=SLATE, alpha=0.35, linewidth=7)
    top.set_ylabel(f"{quantity} (nats/token)")
    bottom.set_xlabel("training tokens (millions)")
    _scale_difference(bottom, 1.2 * max((*parted, band or 0.0)))
    figure.align_ylabels()
    finish(figure, top, recipes_at(runs, size), runs.toy)
    return figure


def _scale_difference(axes: Axes, reach: float) -> None:
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_ylabel("FP8 − BF16\n(nats/token)")
    if reach > 0:
        axes.set_ylim(-reach, reach)


def starts(compared: Sequence[Start]) -> Figure:
    """Training loss in the first minutes of one size, the difference to BF16, and what rounding does to gradients.

    A line a run. The difference is between runs of one seed, so on the same tokens, and drawn to the scale of what
    follows the first tenth of them. Of gradients it is the share that is flushed to zero, the mean over all Linears:
    a point a measurement. Runs that changed their recipe's defaults are dashed.
    """
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(WIDTH, 6.2), sharex=True, height_ratios=(2, 1.2, 1))
    changed = {start.ours.named: start for start in compared if start.ours.changed_settings}
    dashes = dict(zip(changed, itertools.cycle(((0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))), strict=False))
    baselines = {start.baseline.record.seed: start.baseline for start in compared}
    for run in baselines.values():
        curve = run.training_curve()
        top.plot(curve.index / 1e6, curve, **line_style(run.recipe))
    parted: list[float] = []
    for start in compared:
        style = line_style(start.recipe) | {"linestyle": dashes.get(start.ours.named, "-")}
        curve = start.ours.training_curve()
        top.plot(curve.index / 1e6, curve, **style)
        difference = (curve - start.baseline.training_curve()).dropna()
        middle.plot(difference.index / 1e6, difference, **style)
        parted += list(difference[difference.index > difference.index.max() / 10].abs())
        flushed = 100 * flushed_gradients(start.ours)
        bottom.plot(flushed.index / 1e6, flushed, **style, marker="o", markersize=3)
    _scale_difference(middle, 1.2 * max(parted, default=0.0))
    top.set_ylabel("training loss (nats/token)")
    bottom.set_ylabel("gradients\nflushed to 0 (%)")
    # Formats differ by orders of magnitude, and a share may be zero.
    bottom.set_yscale("symlog", linthresh=0.01)
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    bottom.set_ylim(0, 100)
    bottom.set_xlabel("training tokens (millions)")
    figure.align_ylabels()
    others = [
        Line2D([], [], label=start.ours.label, **(line_style(start.recipe) | {"linestyle": dashes[name]}))
        for name, start in changed.items()
    ]
    finish(figure, top, unique(["bf16", *(start.recipe for start in compared)]), toy=False, others=others)
    return figure


def loss_gaps(gaps: Sequence[MeasuredGap]) -> Figure:
    """Validation loss of each FP8 recipe minus BF16's, by size.

    A solid bar is an interval over seeds; a dashed one is what single runs may differ by if they scatter as smaller
    models do.
    """
    sizes, recipes = unique(measured.size for measured in gaps), unique(measured.recipe for measured in gaps)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    axes.axhspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color=SLATE, alpha=0.12, linewidth=0)
    for measured in gaps:
        position = sizes.index(measured.size) + (recipes.index(measured.recipe) - (len(recipes) - 1) / 2) * 0.12
        axes.plot(position, measured.gap.mean, linestyle="none", **point_style(measured.recipe))
        if measured.gap.interval is not None:
            width, style = (1, (0, (2, 2))) if measured.assumed else (2, "solid")
            colour = RECIPE_COLOURS[measured.recipe]
            axes.vlines(position, *measured.gap.interval, color=colour, linewidth=width, linestyle=style)
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xlabel("model (parameters N)")
    axes.set_ylabel("FP8 − BF16,\nvalidation (nats/token)")
    symmetric_limits(axes)
    finish(figure, axes, recipes, gaps[0].runs.toy)
    return figure


def gaps_by_domain(runs: RunSet, size: str) -> Figure:
    """Difference to BF16 in each domain's bits per byte at one size: mean over seeds, with its interval."""
    gaps = domain_gaps(runs, size)
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
    finish(figure, axes, recipes, runs.toy)
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

    Bands are what so few runs know of the scatter; a marker is what was run, none where BF16 was not.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.9))
    pairs = np.unique(np.geomspace(2, 300, 80).round())
    handles = []
    for (name, line), (colour, marker) in zip(lines.items(), LINE_COLOURS.items(), strict=False):
        design = line.design
        low, high = (np.array([design.half_width(n, end) for n in pairs]) for end in design.deviation.interval)
        axes.fill_between(pairs, low, high, color=colour, alpha=0.10, linewidth=0)
        axes.plot(pairs, [design.half_width(n) for n in pairs], color=colour)
        if line.seeds:
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
    finish(figure, axes, [], toy)
    return figure
