"""Chapters run in this process: what their code cells show, without a kernel and without drawing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import matplotlib as mpl
import nbformat
import numpy as np
from IPython.display import Markdown
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from fp8lab import article

mpl.use("agg")


@dataclass(frozen=True)
class Shown:
    """One display of a cell."""

    cell: str
    """The cell's id."""
    text: str
    """Its Markdown; a figure's picture is a digest of what is drawn, and an interactive chart is its data."""

    @property
    def label(self) -> str:
        """'fig-gaps' or 'tbl-gaps' of a figure or table; empty of prose."""
        return next(iter(re.findall(r"\{#((?:fig|tbl)-[\w.-]+)\}", self.text)), "")


def shown(notebook: Path, root: Path, records_dir: Path, replacements: dict[str, str] | None = None) -> list[Shown]:
    """What the code cells of `notebook` display when they run on these records.

    Args:
        root: the chapter's working directory.
        replacements: parts of its source to replace, each of which must be there once.
    """
    found: list[Shown] = []
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    names: dict[str, object] = {}
    with _collecting(found) as start, _working_in(root):
        for cell in cells:
            start(cell.id)
            source = cell.source
            for old, new in (replacements or {}).items():
                source = source.replace(old, new)
            if "parameters" in cell.metadata.get("tags", []):
                source += f"\nrecords_dir = {str(records_dir)!r}"
            exec(compile(source, f"{notebook.name}[{cell.id}]", "exec"), names)
    return found


@contextmanager
def _collecting(found: list[Shown]) -> Iterator:
    current = [""]

    def display(markdown: Markdown) -> None:
        found.append(Shown(current[0], markdown.data))

    def show_figure(figure: Figure, label: str, caption: str) -> None:
        found.append(Shown(current[0], f"![{caption}](drawn:{digest(figure)}){{#fig-{label}}}"))
        pyplot.close(figure)

    def start(cell: str) -> None:
        current[0] = cell

    with (
        patch.object(article, "display", display),
        patch.object(article, "show_figure", show_figure),
        patch.object(article, "chart_html", lambda spec: json.dumps(spec)),
    ):
        yield start


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def digest(figure: Figure) -> str:
    """Of what the artists of a figure hold: the same records give the same, and it takes no drawing."""
    seen = hashlib.sha256()
    for artist in figure.findobj():
        for value in _contents(artist):
            seen.update(np.asarray(value, float).round(12).tobytes() if not isinstance(value, str) else value.encode())
    return seen.hexdigest()[:16]


def _contents(artist: Artist) -> Iterator[object]:
    if isinstance(artist, mpl.lines.Line2D):
        yield artist.get_xydata()
    elif isinstance(artist, mpl.text.Text):
        yield artist.get_text()
    elif isinstance(artist, mpl.patches.Patch):
        yield artist.get_path().vertices
        yield artist.get_patch_transform().get_matrix()
    elif isinstance(artist, mpl.collections.Collection):
        yield from (path.vertices for path in artist.get_paths())
        if artist.get_array() is not None:
            yield np.ma.filled(artist.get_array(), np.nan)
        yield artist.get_offsets()
