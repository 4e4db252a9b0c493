"""From records to the article.

Two steps. `execution` has papermill execute the chapters whose inputs changed, into build/executed/;
the committed notebooks stay without outputs. Then one of two editions renders the executed copies:

- Quarto's, where `quarto` is installed: ``_quarto.yml`` runs the first step itself (`pre_render`) and
  reads the executed copies through `notebook_filter`, so that ``quarto render`` alone does the same;
- a plainer one through pandoc (`pandoc_edition`), which comes with the package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fp8lab.errors import UserError
from fp8lab.publish.book import Book, read_book
from fp8lab.publish.execution import execute_stale_chapters
from fp8lab.records import make_writable

__all__ = ["Book", "execute_stale_chapters", "find_quarto", "publish", "read_book"]


def publish(root: Path, records_dir: Path, site_dir: Path) -> Path:
    """Execute stale chapters and render the article with Quarto, or with pandoc where there is no Quarto.

    Args:
        root: folder of ``_quarto.yml``.
        records_dir: folder of run records, shown by the chapters.
        site_dir: folder to write to.

    Returns:
        The article's first page.

    Raises:
        UserError: no book in `root`, a `site_dir` that cannot be written to, or a chapter that cannot be executed or
            rendered.
    """
    root, records_dir, site_dir = root.resolve(), records_dir.resolve(), site_dir.resolve()
    book = read_book(root)
    make_writable(site_dir)
    execute_stale_chapters(root, records_dir)
    quarto = find_quarto()
    if quarto is not None:
        print(f"article: rendering {len(book.chapters)} chapters with Quarto", flush=True)
        _render_with_quarto(quarto, root, records_dir, site_dir)
    else:
        print("article: no Quarto found, so this is the plainer edition, made with pandoc", flush=True)
        from fp8lab.publish.pandoc_edition import render

        render(book, site_dir)
    return site_dir / "index.html"


def find_quarto() -> str | None:
    """Quarto on PATH, or beside this Python: where pip puts it, and make does not activate the .venv."""
    return shutil.which("quarto") or shutil.which("quarto", os.F_OK | os.X_OK, str(Path(sys.executable).parent))


def _render_with_quarto(quarto: str, root: Path, records_dir: Path, site_dir: Path) -> None:
    environment = os.environ | {"QUARTO_PYTHON": sys.executable, "FP8LAB_RECORDS_DIR": str(records_dir)}
    command = [quarto, "render", str(root), "--output-dir", os.path.relpath(site_dir, root), "--quiet"]
    result = subprocess.run(command, env=environment)
    if result.returncode:
        raise UserError(f"quarto render failed with exit code {result.returncode}; its message stands above")
