"""The README shows what the committed records say."""

from __future__ import annotations

import re
from pathlib import Path

from fp8lab.publish import readme

ROOT = Path(__file__).parents[1]


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
