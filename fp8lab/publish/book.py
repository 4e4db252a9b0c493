"""The book: what ``_quarto.yml`` says of chapters, order, title and sources, for both editions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nbformat

from fp8lab.config import read_yaml
from fp8lab.errors import UserError


@dataclass(frozen=True)
class Chapter:
    """One page of the article."""

    source: Path
    """The committed notebook."""
    executed: Path
    """Its executed copy, under build/."""
    page: str
    """Address of its page in the site: 'chapters/data.html'."""
    title: str

    @property
    def name(self) -> str:
        return self.source.stem


@dataclass(frozen=True)
class Book:
    root: Path
    title: str
    description: str
    chapters: tuple[Chapter, ...]
    bibliography: Path
    records_dir: str
    """Folder of run records, relative to the root."""


def read_book(root: Path) -> Book:
    """Read ``_quarto.yml`` and the chapters' titles.

    Raises:
        UserError: no ``_quarto.yml``, a key that is missing, or a chapter that does not exist.
    """
    path = root / "_quarto.yml"
    config = read_yaml(path)
    try:
        book = config["book"]
        sources = [root / source for source in book["chapters"]]
        return Book(
            root=root,
            title=book["title"],
            description=book["description"],
            chapters=tuple(_chapter(root, source) for source in sources),
            bibliography=root / config["bibliography"],
            records_dir=config["fp8lab"]["records-dir"],
        )
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}: missing") from None


def _chapter(root: Path, source: Path) -> Chapter:
    try:
        notebook = nbformat.read(source, as_version=4)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read as a notebook ({error})") from None
    first = notebook.cells[0].source if notebook.cells else ""
    if not first.startswith("# "):
        raise UserError(f"{source}: the first cell must begin with the chapter's title, '# ...'")
    return Chapter(
        source=source,
        executed=root / "build" / "executed" / source.name,
        page=source.relative_to(root).with_suffix(".html").as_posix(),
        title=first.splitlines()[0].removeprefix("# ").strip(),
    )
