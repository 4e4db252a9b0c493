"""What the chapter on scaling says of runs that a law leaves out, and of runs that follow none."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import tables
from fp8lab.analysis import losses, selection
from fp8lab.analysis.comparison import Deviation
from fp8lab.analysis.runs import plan_runs
from fp8lab.config import parameter_count
from fp8lab.units import span
from tests.chapters import shown
from tests.fixtures import LADDER, SEED_NOISE, move_ladder_losses, write_ladder_records
from tests.projects import copy_sources

SIZES = [parameter_count(model) for model in LADDER]


def text_of_chapter(folder: Path) -> str:
    displays = shown(folder / "chapters" / "scaling.ipynb", folder, folder / "records", {"refits = 200": "refits = 4"})
    return "\n".join(display.text for display in displays)


def chapter_on(folder: Path, loss_of: Callable[[int, float], float], recipe: str = "bf16") -> str:
    """The chapter's text on a ladder whose `recipe` is moved by `loss_of` parameters and tokens a parameter."""
    copy_sources(folder)
    write_ladder_records(folder / "records")
    move_ladder_losses(folder / "records", loss_of, recipe)
    return text_of_chapter(folder)


def test_runs_that_are_left_out_are_named_with_what_hangs_on_it(tmp_path: Path) -> None:
    text = chapter_on(tmp_path, lambda n, budget: 0.8 if n == SIZES[0] and budget < 7 else 0.0)
    assert "those of 7M at 5 tokens a parameter" in text
    assert "all are of 7M, the size may be the reason too" in text
    assert "does not describe these runs" not in text


def test_of_several_sizes_left_out_size_is_not_called_the_reason(tmp_path: Path) -> None:
    text = chapter_on(tmp_path, lambda n, budget: 0.8 if n in SIZES[:2] and budget < 7 else 0.0)
    assert "7M at 5" in text
    assert "13M at 5" in text
    assert "the size may be the reason" not in text


def test_where_no_choice_fits_the_chapter_says_that_the_law_does_not_describe_the_runs(tmp_path: Path) -> None:
    text = chapter_on(tmp_path, lambda n, budget: 0.3 * (-1) ** (SIZES.index(n) + round(math.log2(budget / 5))))
    assert "the law does not describe these runs to within their noise" in text
    assert "have no part in it" not in text


def test_the_run_that_the_law_misses_most_is_named(tmp_path: Path) -> None:
    # One too small a misfit for BF16's losses to be refused, and larger than all others.
    text = chapter_on(tmp_path, lambda n, budget: 0.02 if n == SIZES[2] and budget > 15 else 0.0)
    assert "most of all `bf16` of 19M at 20 tokens a parameter" in text
    assert "BF16's there" not in text


def test_beside_an_fp8_run_that_the_law_misses_most_stands_bf16s_miss(tmp_path: Path) -> None:
    text = chapter_on(tmp_path, lambda n, budget: 0.2 if n == SIZES[1] and budget < 7 else 0.0, recipe="fused")
    found = re.search(r"most of all `fused` of 13M at 5 .* ended (\S+) nats from it \(BF16's there (\S+)\)", text)
    assert found is not None
    miss, beside = (float(number.replace("−", "-")) for number in found.groups())
    assert miss > 0.1 > abs(beside)


def chapter_without(folder: Path, *sizes: str) -> str:
    """The chapter's text on a ladder that has these sizes in BF16 alone."""
    copy_sources(folder)
    write_ladder_records(folder / "records")
    for size in sizes:
        for run in (folder / "records" / "ladder-h200").glob(f"{size}-*"):
            if "bf16" not in run.name:
                shutil.rmtree(run)
    return text_of_chapter(folder)


def test_a_largest_size_without_a_pair_has_no_gap(tmp_path: Path) -> None:
    text = chapter_without(tmp_path, "48M")
    assert "grow from left to right." in text
    assert "alone they are" not in text


def test_a_law_of_bf16_alone_says_nothing_of_fp8(tmp_path: Path) -> None:
    text = chapter_without(tmp_path, "19M", "28M", "48M")
    assert "No FP8 recipe ran its full length at 3 sizes" in text
    assert "BF16 alone" in text
    assert "FP8 on part of" not in text
    assert "FP8 recipe makes use of" not in text


def test_the_choices_compared_are_the_first_and_the_one_in_use(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    points = losses.final_losses(plan_runs(tmp_path, "ladder-h200"))
    choices = list(selection.choices(points, Deviation(SEED_NOISE, degrees=10)))
    first = [choice.steps for choice in choices[: tables.scaling.MOST_CHOICES]]
    assert len(choices) > len(first) + 1
    for in_use, more in ((choices[0], []), (choices[-1], [choices[-1].steps])):
        compared = tables.scaling.compared(choices, in_use.kept)
        assert [choice.steps for choice in compared] == first + more


def test_the_table_marks_the_choice_in_use(tmp_path: Path) -> None:
    write_ladder_records(tmp_path)
    points = losses.final_losses(plan_runs(tmp_path, "ladder-h200"))
    choices = list(selection.choices(points, None))[:2]
    table = tables.scaling.exponents_by_length(choices, choices[1].kept)
    assert table["steps"].str.contains("←").tolist() == [False, True]
    assert table["steps"].str.startswith(tuple(f"{choice.steps:,}" for choice in choices)).all()
    pd.testing.assert_series_equal(table["p"], pd.Series(["–", "–"], name="p"))


@pytest.mark.parametrize(
    ("values", "text"), [([0.5, -1.0, 0.25], "−1.00 to 0.50"), ([1.2], "1.20"), ([1.201, 1.199], "1.20")]
)
def test_a_span_is_from_the_lowest_to_the_highest_and_one_number_where_they_read_alike(
    values: list[float], text: str
) -> None:
    assert span(values, 2) == text
