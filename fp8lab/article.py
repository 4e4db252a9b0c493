"""How a chapter speaks: figures, tables and prose, all as Markdown.

A chapter's code cells display Markdown and nothing else, so that the two editions of the article
(Quarto's and pandoc's) render the very same text, and a caption can say what was computed: which
device, how many seeds. Figures are SVG, sharp at any width, inside the Markdown as data URIs, so a
chapter is one file with nothing beside it to lose.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import pandas as pd
from IPython.display import Markdown, display
from matplotlib import pyplot
from matplotlib.figure import Figure

from fp8lab.analysis.runs import DEMO_COMMAND, RunSet
from fp8lab.chart.page import chart_html


def say(text: str) -> None:
    """Display prose: Markdown with citations (@key) and references to figures (@fig-name)."""
    display(Markdown(text))


def show_figure(figure: Figure, label: str, caption: str) -> None:
    """Display a figure that prose can refer to as ``@fig-<label>``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    display(Markdown(f"![{caption}](data:image/svg+xml;base64,{encoded}){{#fig-{label}}}"))


def show_chart(spec: dict[str, Any]) -> None:
    """Make the picture of figure ``spec["figure"]``, displayed before, interactive (`fp8lab.chart.page`)."""
    display(Markdown(f"```{{=html}}\n{chart_html(spec)}\n```"))


def show_table(table: pd.DataFrame, label: str, caption: str) -> None:
    """Display a table that prose can refer to as ``@tbl-<label>``; wide ones scroll within themselves."""
    display(Markdown(f"::: {{#tbl-{label}}}\n\n{_html_table(table)}\n\n{caption}\n\n:::"))


SENTENCE = 40
"""Characters from which a cell is one, and may be broken into lines."""


def _cell(tag: str, text: str, right: bool) -> str:
    """HTML of one cell: literal text, of which `...` alone is marked, as code."""
    mark = ' class="sentence"' if len(text) >= SENTENCE else ""
    content = re.sub(f"{literal('`')}(.+?){literal('`')}", r"<code>\1</code>", literal(text))
    return f'<{tag}{mark} style="text-align: {"right" if right else "left"}">{content}</{tag}>'


def _html_table(table: pd.DataFrame) -> str:
    """The table as HTML: first column and text to the left, numbers to the right; sentences are broken into lines."""
    numeric = [position > 0 and _is_numeric(table.iloc[:, position]) for position in range(table.shape[1])]

    def row(tag: str, values: list[object]) -> str:
        cells = (_cell(tag, _text(value), right) for value, right in zip(values, numeric, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(row("td", list(values)) for values in table.itertuples(index=False, name=None))
    return (
        f'<div class="table-scroll">\n<table>\n<thead>{row("th", list(table.columns))}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _text(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return "–"
    return str(value)


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) or bool(
        column.astype(str).str.match(r"^[+\-−–]?[\d.,]*(e\d+)?[kMBT]?\+?( ?[×%±].*)?[ᵃᵇᶜᵈ]*$").all()
    )


def literal(text: str) -> str:
    """Markdown, and HTML too, that shows `text` as it is, whatever marks it holds: an error's message, for one.

    Marks become character references, which neither pandoc nor Quarto takes for marks; nor, without a line break, is
    anything in it the first of a line. Not for code spans and code blocks, which show a reference as it is written.
    """
    return re.sub(r"[\\`*_{}\[\]<>#!~|$^@&:\"'\n\r]", lambda mark: f"&#{ord(mark[0])};", text)


def verbatim(text: str) -> str:
    """`text` as it is, in lines of its own: what a model wrote, for one.

    HTML and no fenced code block, in which Quarto would still replace its shortcodes.
    """
    return f'<pre class="sample"><code>{literal(text.strip())}</code></pre>'


def missing_records(what: str, command: str = DEMO_COMMAND) -> None:
    """Say which command makes the records that a chapter needs."""
    say(
        f"::: {{.callout-note}}\n\nThis part shows {what}, and there is no record of that yet. "
        f"`{command}` makes it; `fp8lab publish` then fills this page.\n\n:::"
    )


def scale_note(runs: RunSet) -> str:
    """One sentence on how far the numbers of `runs` carry."""
    if not runs.toy:
        return runs.source
    return (
        "These are the demo's numbers: models of toy size trained on a CPU with FP8 arithmetic emulated. "
        "They show that the method works and say little about larger models."
    )
