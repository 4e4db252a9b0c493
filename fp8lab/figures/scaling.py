"""Loss against compute, size and tokens, drawn."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fp8lab.analysis import scaling
from fp8lab.analysis.laws import PUBLISHED, JointLaw
from fp8lab.analysis.losses import final_losses
from fp8lab.analysis.runs import RunSet
from fp8lab.figures.style import NEUTRAL, RECIPE_COLOURS, WIDTH, finish, label, line_style, point_style
from fp8lab.units import number


def loss_against_compute(runs: RunSet) -> Figure:
    """Every run's training curve against the FLOPs spent, with its final validation loss as a marker."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for run in runs.runs:
        curve = run.training_curve()
        per_token = run.record.flops.per_token_matmul_attention_causal
        axes.plot(curve.index * per_token, curve, **line_style(run.recipe))
        axes.plot(run.record.flops.total, run.validation_loss, **point_style(run.recipe))
    for size in runs.sizes:
        last = runs.where(size=size)[0]
        label(axes, size, last.record.flops.total, last.validation_loss)
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel("loss (nats/token)")
    finish(figure, axes, runs.recipes, runs.toy)
    return figure


def scaling_panels(runs: RunSet, law: JointLaw | None = None, fitted: pd.DataFrame | None = None) -> Figure:
    """Loss against compute, against parameters and against tokens, one panel below the other.

    Curves are training losses; markers are final validation losses, small ones those of decay branches. The frontier
    of each precision is the lower convex hull of its markers. Lines through markers are `law`, or power laws where
    there is none.

    Args:
        fitted: the rows of `losses.final_losses` that `law` was fitted to, over which it is drawn; all by default.
    """
    figure, (compute, parameters, tokens) = plt.subplots(3, 1, figsize=(WIDTH, 9.6), height_ratios=(1.25, 1, 1))
    points = final_losses(runs)
    for axes in figure.axes:
        _log_log(axes)
    for axes in (parameters, tokens):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    _compute_panel(compute, runs, points)
    _parameters_panel(parameters, points)
    _tokens_panel(tokens, points)
    for axes, x, alike in ((parameters, "parameters", "budget"), (tokens, "tokens", "parameters")):
        _plot_lines(axes, points if fitted is None else fitted, x, alike, law)
    finish(figure, compute, runs.recipes, runs.toy)
    return figure


def _compute_panel(axes: Axes, runs: RunSet, points: pd.DataFrame) -> None:
    for run in (*runs.runs, *runs.branches):
        curve = run.training_curve()
        per_token = run.record.flops.per_token_matmul_attention_causal
        axes.plot(curve.index * per_token, curve, **line_style(run.recipe) | {"linewidth": 0.8, "alpha": 0.35})
    for recipe in runs.recipes:
        of_recipe = points[points["recipe"] == recipe]
        efficient = of_recipe.iloc[scaling.frontier(of_recipe["flops_causal"], of_recipe["loss"])]
        if len(efficient) > 1:
            axes.plot(efficient["flops_causal"], efficient["loss"], **line_style(recipe))
    _plot_points(axes, points, "flops_causal")
    _label_sizes(axes, points, "flops_causal")
    # What lies above and to the left is the first steps, which no frontier needs.
    axes.set_ylim(points["loss"].min() - 0.12, points["loss"].max() + 0.75)
    _frame(axes, points["flops_causal"], (4, 3), "against compute", "training compute (FLOPs)")


def _parameters_panel(axes: Axes, points: pd.DataFrame) -> None:
    _plot_points(axes, points, "parameters")
    for _, group in points.groupby("budget"):
        last = group.iloc[int(group["parameters"].to_numpy().argmax())]
        label(axes, f"{last['budget']:g} tokens/N", last["parameters"], last["loss"])
    _frame(axes, points["parameters"], (1.4, 2.4), "against parameters", "parameters N (embedding included once)")


def _tokens_panel(axes: Axes, points: pd.DataFrame) -> None:
    _plot_points(axes, points, "tokens")
    _label_sizes(axes, points, "tokens")
    _frame(axes, points["tokens"], (1.4, 2), "against tokens", "training tokens D")


def _plot_lines(axes: Axes, points: pd.DataFrame, x: str, alike: str, law: JointLaw | None) -> None:
    """Lines along `x` for the markers of one recipe that share what `alike` names: `law`, or a power law a line."""
    for _, group in points.groupby(["recipe", alike], sort=False):
        recipe, shared = str(group["recipe"].iloc[0]), float(group[alike].iloc[0])
        if group[x].nunique() < 2 or (law is not None and not law.covers(recipe)):
            continue
        at = np.geomspace(group[x].min(), group[x].max(), 40)
        if law is None:
            line = scaling.fit_power_law(group[x], group["loss"])(at)
        else:
            line = law(at, shared * at, recipe) if x == "parameters" else law(shared, at, recipe)
        axes.plot(at, line, color=RECIPE_COLOURS[recipe], linewidth=0.9, alpha=0.7)


def _frame(axes: Axes, x: pd.Series, room: tuple[float, float], title: str, x_label: str) -> None:
    """Title and horizontal axis of a panel; `room` is that left and right of the points, as factors."""
    axes.set_xlim(x.min() / room[0], x.max() * room[1])
    axes.set_title(title)
    axes.set_xlabel(x_label)


def _plot_points(axes: Axes, points: pd.DataFrame, x: str) -> None:
    """A marker a final loss; BF16's rings first, under the others."""
    for recipe in sorted(points["recipe"].unique(), key=list(RECIPE_COLOURS).index):
        for is_branch, scale in ((True, 0.6), (False, 0.85)):
            rows = points[(points["recipe"] == recipe) & (points["is_branch"] == is_branch)]
            style = point_style(recipe)
            style |= {"markersize": style["markersize"] * scale, "linestyle": "none"}
            axes.plot(rows[x], rows["loss"], **style)


def _label_sizes(axes: Axes, points: pd.DataFrame, x: str) -> None:
    """The name of each size beside its longest run."""
    for size, group in points.groupby("size", sort=False):
        last = group.iloc[int(group["tokens"].to_numpy().argmax())]
        label(axes, str(size), last[x], last["loss"])


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
        beyond: `scaling.extrapolated`.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    budget = beyond["tokens"].iloc[0] / beyond["parameters"].iloc[0]
    measured, last = beyond["parameters"].iloc[0], beyond["parameters"].iloc[-1]
    inside = np.geomspace(points["parameters"].min(), measured, 40)
    outside = np.geomspace(measured, last, 60)
    colour = RECIPE_COLOURS["bf16"]
    band = scaling.band([drawn(outside, budget * outside) for drawn in draws])
    axes.axvspan(measured, last * 1.2, color="#f4f4f4", zorder=-1, linewidth=0)
    axes.plot(points["parameters"], points["loss"], linestyle="none", label="measured", **point_style("bf16"))
    axes.plot(inside, law(inside, budget * inside), color=colour, label="fitted")
    axes.plot(outside, law(outside, budget * outside), color=colour, linestyle="--", label="extrapolated")
    axes.fill_between(outside, *band, color=colour, alpha=0.15, linewidth=0, label="its 95% interval")
    for name, style in zip(PUBLISHED, (":", "-.", (0, (6, 2, 1, 2, 1, 2))), strict=True):
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
