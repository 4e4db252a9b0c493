"""The README shows what the committed records say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from fp8lab.analysis.timings import short_device
from fp8lab.publish import read_book, readme
from fp8lab.publish.dependencies import PACKAGE, package_files

ROOT = Path(__file__).parents[1]
SMALL = {"errors", "estimate", "schedule", "spikes", "units"}
"""Helpers that need no place in the order."""


def labels(svg: str) -> list[str]:
    """The texts of a figure: matplotlib writes each as a comment above its glyphs."""
    return re.findall(r"<!-- (.+?) -->", svg)


def points(svg: str) -> list[tuple[float, float]]:
    """Where its markers are, to a tenth of a point."""
    places = re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"', svg)
    return [(round(float(x), 1), round(float(y), 1)) for x, y in places]


def test_the_figure_is_what_the_records_draw() -> None:
    committed = (ROOT / readme.FIGURE).read_text()
    drawn = readme.draw(ROOT / "runs" / "records").decode()
    assert str(readme.FIGURE) in (ROOT / "README.md").read_text()
    assert labels(committed) == labels(drawn) != []
    assert points(committed) == points(drawn) != [], "stale: python -m fp8lab.publish.readme draws it again"


def test_the_readme_names_the_device_and_the_plans_that_are_drawn() -> None:
    _, _, below = (ROOT / "README.md").read_text().partition(f"]({readme.FIGURE})\n\n")
    caption = below.partition("\n\n")[0]
    drawn = readme.occasions(ROOT / "runs" / "records")
    assert {short_device(speed.device) for speed in drawn} == set(re.findall(r"\b[A-Z]\d{2,3}\b", caption)) != set()
    assert {speed.record.plan for speed in drawn} == set(re.findall(r"`runs/records/([^`]+)`", caption))


def test_the_reading_order_names_every_module_that_a_page_rests_on() -> None:
    _, _, order = (ROOT / "README.md").read_text().partition("The package is meant to be read")
    named = set(re.findall(r"`(\w+)`", order))
    assert all((PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() for name in named)
    notebooks = [chapter.source for chapter in read_book(ROOT).chapters]
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in package_files(notebooks)}
    assert modules - SMALL - {"__init__"} <= named


@pytest.mark.parametrize("package", ["analysis", "running", "training"])
def test_a_package_says_what_each_of_its_modules_is_for(package: str) -> None:
    order = importlib.import_module(f"fp8lab.{package}").__doc__
    named = re.findall(r"`(\w+)`", order)
    assert sorted(named) == sorted(path.stem for path in (PACKAGE / package).glob("[!_]*.py")), "each, and once"
