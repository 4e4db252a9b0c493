"""Figures: what is drawn is what the records say, labelled, in one colour a precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fp8lab import figures
from fp8lab.analysis import laws, losses, scaling, variance
from fp8lab.analysis.composition import data_record
from fp8lab.analysis.occasions import speed_runs
from fp8lab.analysis.runs import Run, RunSet, training_runs
from fp8lab.config import RECIPES
from tests.fixtures import (
    DOMAINS,
    LADDER_LAW,
    SIZES,
    write_demo_records,
    write_ladder_records,
    write_run,
    write_speed_records,
    write_variance_records,
)

mpl.use("agg")


def fp8_run(runs: RunSet) -> Run:
    return next(run for run in runs.where(size=runs.sizes[-1]) if run.recipe != "bf16")


WEIGHTS = dict(zip(DOMAINS, (0.65, 0.15, 0.10, 0.10), strict=True))
TRAINING_FIGURES: dict[str, Callable[[RunSet], Figure]] = {
    "loss_curves": lambda runs: figures.loss.loss_curves(runs, runs.sizes[-1]),
    "validation_curves": lambda runs: figures.loss.validation_curves(runs, runs.sizes[-1], WEIGHTS),
    "loss_against_compute": figures.scaling.loss_against_compute,
    "scaling_panels": figures.scaling.scaling_panels,
    "loss_gaps": lambda runs: figures.loss.loss_gaps(losses.measured_gaps([runs])),
    "gaps_by_domain": lambda runs: figures.loss.gaps_by_domain(runs, runs.sizes[0]),
    "gradient_norms": lambda runs: figures.health.gradient_norms(runs, runs.sizes[-1]),
    "benchmark_scores": figures.scores.benchmark_scores,
    "underflow": lambda runs: figures.health.health_map(fp8_run(runs), "underflow_fraction", runs.toy),
    "amax_growth": lambda runs: figures.health.health_map(fp8_run(runs), "growth", runs.toy),
    "swiglu_outliers": lambda runs: figures.health.swiglu_outliers(runs.where(size=runs.sizes[0]), runs.toy),
    "activation_kurtosis": lambda runs: figures.health.activation_kurtosis(runs.where(size=runs.sizes[0]), runs.toy),
}


@pytest.fixture
def runs(tmp_path: Path) -> RunSet:
    write_demo_records(tmp_path)
    return training_runs(tmp_path)


@pytest.fixture(autouse=True)
def styled() -> Iterator[None]:
    figures.style.use_style()
    yield
    pyplot.close("all")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(mpl.text.Text)]


def in_colour(figure: Figure, recipe: str) -> list[np.ndarray]:
    """The y values of every line in the recipe's colour."""
    lines = [line for axes in figure.axes for line in axes.lines]
    colour = figures.style.RECIPE_COLOURS[recipe].lower()
    return [np.asarray(line.get_ydata(), float) for line in lines if to_hex(line.get_color()) == colour]


@pytest.mark.parametrize("draw", TRAINING_FIGURES.values(), ids=TRAINING_FIGURES)
def test_axes_are_labelled_and_toy_scale_is_said_in_the_picture(runs: RunSet, draw: Callable) -> None:
    figure = draw(runs)
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert texts(figure).count("toy scale, CPU") == 1


def assert_nothing_is_cut_off(figure: Figure) -> None:
    """Ticks are left out: axes keep labels for those outside their limits, which are not drawn."""
    figure.draw_without_rendering()
    page = figure.bbox.padded(1)
    labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    labels += [text for legend in figure.legends for text in legend.get_texts()]
    for label in filter(mpl.text.Text.get_text, labels):
        box = label.get_window_extent()
        inside = (page.x0 <= box.x0, box.x1 <= page.x1, page.y0 <= box.y0, box.y1 <= page.y1)
        assert all(inside), label.get_text()


@pytest.mark.parametrize("draw", TRAINING_FIGURES.values(), ids=TRAINING_FIGURES)
def test_no_label_is_cut_off(runs: RunSet, draw: Callable) -> None:
    assert_nothing_is_cut_off(draw(runs))


def test_no_label_of_the_speed_figures_is_cut_off(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    speeds = speed_runs(tmp_path)
    for figure in (figures.speed.throughput(speeds), figures.speed.peak_memory(speeds)):
        assert_nothing_is_cut_off(figure)
    for profile in speeds[0].profiles().values():
        assert_nothing_is_cut_off(figures.speed.step_breakdown(profile))


@pytest.mark.parametrize("draw", TRAINING_FIGURES.values(), ids=TRAINING_FIGURES)
def test_a_measurement_is_not_called_toy(tmp_path: Path, draw: Callable) -> None:
    for model in SIZES[:2]:
        for recipe in ("bf16", "fused"):
            write_run(tmp_path, "ladder-h200", model, recipe, device_name="NVIDIA H200")
    assert "toy scale, CPU" not in texts(draw(training_runs(tmp_path)))


def test_every_recipe_has_a_colour_and_a_marker_of_its_own() -> None:
    assert set(RECIPES) <= set(figures.style.RECIPE_COLOURS)
    assert len(set(figures.style.RECIPE_COLOURS.values())) == len(figures.style.RECIPE_COLOURS)
    assert len(set(figures.style.RECIPE_MARKERS.values())) == len(figures.style.RECIPE_MARKERS)


def ladder(folder: Path) -> tuple[RunSet, laws.JointLaw]:
    write_ladder_records(folder)
    return training_runs(folder), LADDER_LAW


def test_every_final_loss_is_in_every_panel_of_scaling(tmp_path: Path) -> None:
    runs, law = ladder(tmp_path)
    points = losses.final_losses(runs)
    for axes, column in zip(
        figures.scaling.scaling_panels(runs, law).axes, ("flops_causal", "parameters", "tokens"), strict=True
    ):
        markers = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
        drawn = {(x, y) for line in markers for x, y in zip(*line.get_data(), strict=True)}
        assert drawn == set(zip(points[column], points["loss"], strict=True))


@pytest.mark.parametrize("has_law", [True, False])
def test_lines_are_drawn_over_what_was_measured_and_no_further(tmp_path: Path, has_law: bool) -> None:
    runs, law = ladder(tmp_path)
    compute, *panels = figures.scaling.scaling_panels(runs, law if has_law else None).axes
    points = losses.final_losses(runs)
    for axes, column in zip(panels, ("parameters", "tokens"), strict=True):
        lines = [line for line in axes.lines if line.get_marker() in ("None", None, "")]
        # A line a recipe and budget, and a line a recipe and size.
        assert len(lines) == {"parameters": 9, "tokens": 15}[column]
        ends = [line.get_xdata() for line in lines]
        assert min(map(np.min, ends)) == pytest.approx(points[column].min())
        assert max(map(np.max, ends)) == pytest.approx(points[column].max())
    # A curve a run or branch, and a frontier a precision.
    assert len([line for line in compute.lines if line.get_marker() in ("None", None, "")]) == len(points) + 3


def test_a_law_is_not_drawn_over_what_it_was_not_fitted_to(tmp_path: Path) -> None:
    runs, law = ladder(tmp_path)
    points = losses.final_losses(runs)
    fitted = points[points["tokens"] > points["tokens"].min()]
    *_, tokens = figures.scaling.scaling_panels(runs, law, fitted).axes
    drawn = [line.get_xdata() for line in tokens.lines if line.get_marker() in ("None", None, "")]
    assert min(map(np.min, drawn)) == pytest.approx(fitted["tokens"].min())


def test_what_is_extrapolated_is_dashed_and_named(tmp_path: Path) -> None:
    runs, law = ladder(tmp_path)
    points = losses.final_losses(runs)
    at_budget = points[(points["recipe"] == "bf16") & ~points["is_branch"]]
    beyond = scaling.extrapolated(points, law, [law, law], 20)
    figure = figures.scaling.extrapolation(at_budget, law, [law, law], beyond)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    largest = points["parameters"].max()
    assert max(lines["fitted"].get_xdata()) <= largest * 1.001
    assert lines["fitted"].get_linestyle() == "-"
    assert min(lines["extrapolated"].get_xdata()) >= largest * 0.999
    assert lines["extrapolated"].get_linestyle() == "--"
    assert set(lines["measured"].get_xdata()) == set(at_budget["parameters"])
    assert {"125M", "250M", "350M", "1.5B"} < set(texts(figure))
    assert_nothing_is_cut_off(figure)
    for name in laws.PUBLISHED:
        assert lines[name].get_ydata()[0] == pytest.approx(lines["extrapolated"].get_ydata()[0])
        assert lines[name].get_linestyle() != "-"


def test_the_lower_panel_is_fp8_minus_bf16(runs: RunSet) -> None:
    size = runs.sizes[-1]
    figure = figures.loss.validation_curves(runs, size, WEIGHTS)
    (bf16,) = in_colour(figure, "bf16")
    fp8, difference = in_colour(figure, "tensorwise")
    assert difference == pytest.approx(fp8 - bf16)
    low, high = figure.axes[1].get_ylim()
    assert low == -high


def test_the_noise_between_seeds_is_drawn_where_it_was_measured_at_the_end(runs: RunSet) -> None:
    size = runs.sizes[-1]
    plain, banded = (figures.loss.validation_curves(runs, size, WEIGHTS, band) for band in (None, 0.125))
    assert not plain.axes[1].collections
    (bar,) = banded.axes[1].collections
    ((start, end),) = bar.get_segments()
    tokens = max(run.record.tokens for run in runs.where(size=size)) / 1e6
    assert (tuple(start), tuple(end)) == ((tokens, -0.125), (tokens, 0.125))


def test_gaps_are_drawn_at_their_size_with_their_interval(tmp_path: Path) -> None:
    write_demo_records(tmp_path, seeds=(1, 2, 3))
    runs = training_runs(tmp_path)
    figure = figures.loss.loss_gaps(losses.measured_gaps([runs]))
    drawn = sorted(float(values[0]) for values in in_colour(figure, "tensorwise"))
    assert drawn == pytest.approx(sorted(runs.gap(size, "tensorwise").mean for size in runs.sizes))
    assert len(figure.axes[0].collections) == len(runs.gaps())


def test_single_seeds_have_a_dashed_bar_where_smaller_models_have_seeds(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        for model in SIZES[:2]:
            write_run(tmp_path, "ladder-h200", model, recipe, device_name="NVIDIA H200")
        for seed in (1, 2, 3):
            write_run(tmp_path, "seeds-h200", SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
    figure = figures.loss.loss_gaps(losses.measured_gaps(losses.measured_sets(tmp_path)))
    solid, dashed = figure.axes[0].collections
    assert solid.get_linestyle()[0][1] is None
    assert dashed.get_linestyle()[0][1] is not None
    assert "toy scale, CPU" not in texts(figure)


def test_half_widths_shrink_with_runs_and_are_marked_where_there_are_runs(tmp_path: Path) -> None:
    write_variance_records(tmp_path)
    study = variance.study(tmp_path)
    lines = variance.lines([], study)
    figure = figures.loss.pairs_needed(lines, toy=False)
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 10]
    marks = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert len(curves) == len(marks) == len(lines)
    for curve, mark in zip(curves, marks, strict=True):
        assert (np.diff(np.asarray(curve.get_ydata(), float)) < 0).all()
        pairs = list(curve.get_xdata())
        assert curve.get_ydata()[pairs.index(mark.get_xdata()[0])] == mark.get_ydata()[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert_nothing_is_cut_off(figure)


def test_scores_show_one_metric_a_task(runs: RunSet) -> None:
    figure = figures.scores.benchmark_scores(runs)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "demo_choice (acc)",
        "demo_boolean (acc)",
        "demo_physical (acc)",
    ]
    assert all(len(axes.containers) == len(runs.runs) for axes in figure.axes)


def test_throughput_shows_every_recipe_but_bf16_and_marks_heads_in_fp8(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    figure = figures.speed.throughput(speed_runs(tmp_path))
    markers = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert len(markers) == 3 * 4
    hollow = [line for line in markers if line.get_markerfacecolor() == "white"]
    assert {to_hex(line.get_color()) for line in hollow} == {figures.style.RECIPE_COLOURS["fused"].lower()}
    assert len(hollow) == 3
    assert "toy scale, CPU" not in texts(figure)


def test_a_breakdown_adds_up_to_the_step(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    (speed,) = speed_runs(tmp_path)
    (profile,) = speed.profiles().values()
    figure = figures.speed.step_breakdown(profile)
    ends = [max(bar.get_x() + bar.get_width() for bar in bars) for bars in zip(*figure.axes[0].containers, strict=True)]
    assert ends == pytest.approx([sum(categories.values()) for categories in profile.values()])


def test_memory_is_in_gibibytes(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    figure = figures.speed.peak_memory(speed_runs(tmp_path))
    assert max(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(88, rel=1e-6)


def test_the_mixtures_shares_are_drawn(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    data = data_record(tmp_path, training_runs(tmp_path))
    assert data is not None
    _, shares = figures.data.data_composition(data, toy=True).axes
    assert [bar.get_width() for bar in shares.patches] == list(WEIGHTS.values())
