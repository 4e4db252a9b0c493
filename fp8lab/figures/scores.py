"""Benchmark scores, drawn."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fp8lab.analysis.runs import RunSet
from fp8lab.analysis.scores import usual_accuracies
from fp8lab.figures.style import NEUTRAL, RECIPE_COLOURS, RECIPE_MARKERS, WIDTH, finish
from fp8lab.units import unique


def benchmark_scores(runs: RunSet) -> Figure:
    """Accuracy of every scored run by task, in its usual metric, with lm-eval's standard error and the random guess."""
    scores = usual_accuracies(runs)
    tasks = unique(scores["task"])
    figure, grid = plt.subplots(
        len(tasks), 1, figsize=(WIDTH, 0.7 + len(tasks) * (0.35 + 0.22 * len(runs.sizes))), sharex=True, squeeze=False
    )
    for axes, task in zip(grid[:, 0], tasks, strict=True):
        _task_scores(axes, scores[scores["task"] == task], runs)
    grid[-1, 0].set_xlabel("accuracy")
    grid[-1, 0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    finish(figure, grid[0, 0], unique(scores["recipe"]), runs.toy)
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
