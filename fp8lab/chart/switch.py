"""What FP8 gains and costs, as points: timed settings and trained runs against BF16.

The picture and the data of its interactive twin are made of the same points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fp8lab.analysis.runs import Run, RunSet
from fp8lab.analysis.timings import fp8_only
from fp8lab.figures.style import RECIPE_COLOURS, RECIPE_MARKERS, WIDTH, finish, point_style
from fp8lab.units import number, unique


def chart_points(table: pd.DataFrame, sets: Sequence[RunSet]) -> pd.DataFrame:
    """What the first page's chart draws, interactive or not: timed settings, and trained runs.

    Args:
        table: `timings.with_verdicts`, or an empty frame.
        sets: plans whose runs are shown, each against its own BF16.

    Returns:
        A row a point. Columns: panel (its title: whole models, and the speed map's blocks, of each device, the one
        with most settings first; then the losses, plan by plan), axes (key of `CHART_AXES`), series (recipe), hollow
        (head in FP8), x, tick (what x is called), y, low, high (95%, NaN without an interval), title, facts (dict of
        what a reader sees of the record).
    """
    points = []
    if len(table):
        shown = fp8_only(table)
        for kind in ("model", "blocks"):
            own = shown[shown["kind"] == kind]
            settings = own.groupby("device")["setting"].transform("nunique").to_numpy()
            points += [_speed_point(own.iloc[index]) for index in (-settings).argsort(kind="stable")]
    for runs in sets:
        baselines = {
            size: sum(losses) / len(losses)
            for size in runs.sizes
            if (losses := [run.validation_loss for run in runs.where(size=size, recipe="bf16")])
        }
        points += [_loss_point(run, baselines[run.size]) for run in runs.runs if run.size in baselines]
    columns = ["panel", "axes", "series", "hollow", "x", "tick", "y", "low", "high", "title", "facts"]
    return pd.DataFrame(points, columns=columns)


def _speed_point(row: pd.Series) -> dict[str, object]:
    head = ", head in FP8 too" if row["head"] == "fp8" else ""
    what = "Whole models" if row["kind"] == "model" else "Blocks of four layers"
    ratio = f"{row['ratio']:.3f}"
    if row["interval_low"] == row["interval_low"]:
        ratio += f" ({row['interval_low']:.3f} to {row['interval_high']:.3f})"
    return {
        "panel": f"{what} on {row['device']}: speed against BF16",
        "axes": "speed",
        "series": row["recipe"],
        "hollow": row["head"] == "fp8",
        "x": float(row["width"]),
        "tick": f"{row['width']:,}",
        "y": row["ratio"],
        "low": row["interval_low"],
        "high": row["interval_high"],
        "title": f"{row['recipe']}{head} at {row['model']}",
        "facts": {
            "× BF16's tokens/s": ratio,
            "so": row["verdict"],
            "all rounds": f"{row['low']:.3f} to {row['high']:.3f}, {row['rounds']} in all, {row['occasions']} "
            f"occasion{'' if row['occasions'] == 1 else 's'} with an interval",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "step": f"{row['step_ms']:.1f} ms",
            "width": f"{row['width']:,}",
            "micro-batch": f"{row['micro_batch']} × {row['seq_len']:,} = {row['micro_batch_tokens']:,} tokens",
            "peak memory": f"{row['peak_memory_bytes'] / 2**30:.1f} GiB, {row['memory_ratio']:.2f} of BF16's",
            "device": row["device"],
            "record": row["runs"],
            "commit": row["commits"],
        },
    }


def _loss_point(run: Run, baseline: float) -> dict[str, object]:
    record = run.record
    difference = run.validation_loss - baseline
    facts = {
        "validation loss": f"{run.validation_loss:.4f} nats/token",
        "minus the mean of the plan's BF16 at this size": f"{difference:+.4f}".replace("-", "−"),
        "parameters, width": f"{number(run.parameters)}, {record.model.d_model:,}",
        "trained on": f"{number(record.tokens)} tokens",
        "seed": str(record.seed),
    }
    if record.speed and not record.emulated and record.speed.peak_memory_bytes:
        if record.speed.tokens_per_second_median is not None:
            shared = record.provenance.concurrent_runs
            facts["tokens/s"] = f"{record.speed.tokens_per_second_median:,.0f}" + (
                f", with {shared} runs on the GPU at once" if shared > 1 else ""
            )
        facts["peak memory"] = f"{record.speed.peak_memory_bytes / 2**30:.1f} GiB"
    facts |= {
        "device": record.provenance.device_name + (", FP8 emulated" if record.emulated else ""),
        "record": f"{record.plan}/{record.run}",
        "commit": record.provenance.git_commit[:7],
    }
    return {
        "panel": f"Loss of every run of {record.plan} against BF16",
        "axes": "loss",
        "series": run.recipe,
        "hollow": record.head == "fp8",
        "x": float(run.parameters),
        "tick": run.size,
        "y": difference,
        "low": float("nan"),
        "high": float("nan"),
        "title": f"{run.recipe} at {run.size}, seed {record.seed}",
        "facts": facts,
    }


CHART_AXES = {
    "speed": ("width (d_model)", "tokens/s, × BF16", 1.0),
    "loss": ("parameters N", "loss − BF16 (nats/token)", 0.0),
}
"""Axes of the first page's chart, and BF16's place on the second."""


def switch_chart(points: pd.DataFrame, toy: bool) -> Figure:
    """Timed settings by width, and trained runs by size, against BF16: what `switch_chart_spec` makes interactive.

    Args:
        points: `chart_points`.
        toy: whether the trained runs are the demo's.
    """
    panels = unique(points["panel"])
    figure, grid = plt.subplots(len(panels), 1, figsize=(WIDTH, 0.6 + 2.7 * len(panels)), squeeze=False)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        rows = points[points["panel"] == panel]
        label, quantity, reference = CHART_AXES[rows["axes"].iloc[0]]
        recipes = [recipe for recipe in RECIPE_COLOURS if recipe in set(rows["series"])]
        for index, recipe in enumerate(recipes):
            offset = 1.035 ** (index - (len(recipes) - 1) / 2)
            for _, row in rows[rows["series"] == recipe].iterrows():
                style = point_style(recipe, hollow=row["hollow"]) | {"markersize": 6.5}
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
        axes.set_title(panel.partition(":")[0])
    shown = [recipe for recipe in RECIPE_COLOURS if recipe in set(points["series"])]
    finish(figure, grid[-1, 0], shown, toy and "loss" in set(points["axes"]))
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
    """The same for `chart.page`, whose reader chooses recipes and sees the facts of each record.

    Args:
        label: of the figure that `switch_chart` is displayed as.
    """
    panels = []
    for panel, rows in points.groupby("panel", sort=False):
        x_label, quantity, reference = CHART_AXES[rows["axes"].iloc[0]]
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
                "title": str(panel) + (" (toy scale, CPU)" if toy and rows["axes"].iloc[0] == "loss" else ""),
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
