"""A figure's interactive twin: data as JSON, style and script, all inside the page.

The picture stays the figure, for readers without JavaScript and for print; ``chart.js`` draws the same points in
its place. Nothing is fetched, and what the data hold can end neither their script element nor the raw block.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

ASSETS = ("chart.css", "chart.js")


def chart_html(spec: dict[str, Any]) -> str:
    """HTML that makes the picture of figure ``spec["figure"]`` interactive; it must stand after the figure.

    Args:
        spec: figure (its id), series [{name, colour, marker}], panels [{title, x {label, ticks [[value, text]]},
            y {label, reference}, points [{series, hollow, x, y, low, high, title, facts [[name, value]]}]}].
    """
    style, script = (resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ASSETS)
    data = json.dumps(spec, ensure_ascii=True, allow_nan=False)
    # JSON has these characters inside strings alone, where their escapes mean the same.
    for character in "<>&`":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return (
        f"<style>\n{style}</style>\n"
        f'<script type="application/json" class="chart-data">{data}</script>\n'
        f"<script>\n{script}</script>"
    )
