"""Quarto's ``ipynb-filters``: swaps a committed chapter for its executed copy.

Quarto gives the committed notebook on stdin and renders what comes back on stdout. The copy is found
by the notebook's own metadata (``fp8lab.chapter``), since Quarto does not tell the file's name. Code
cells become the Markdown that they displayed: readers see the article, and both editions render the
very same text.

Only the standard library is used: whichever Python Quarto finds can run this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EXECUTED = Path(__file__).resolve().parents[2] / "build" / "executed"


def prose(notebook: dict[str, Any]) -> list[str]:
    """The chapter as Markdown, a string a cell: Markdown cells as they are, code cells by what they displayed."""
    texts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            texts.append(_joined(cell["source"]))
        elif cell["cell_type"] == "code":
            shown = [output["data"]["text/markdown"] for output in cell["outputs"] if _is_markdown(output)]
            texts.extend(_joined(text) for text in shown)
    return texts


def _is_markdown(output: dict[str, Any]) -> bool:
    return output["output_type"] in ("display_data", "execute_result") and "text/markdown" in output["data"]


def _joined(text: str | list[str]) -> str:
    """Notebooks store text whole or as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def executed_copy(committed: dict[str, Any]) -> dict[str, Any]:
    """What to render for a committed chapter: unchanged while there is no executed copy (Quarto reads titles early)."""
    path = EXECUTED / f"{committed['metadata']['fp8lab']['chapter']}.ipynb"
    if not path.exists():
        return committed
    texts = prose(json.loads(path.read_text(encoding="utf-8")))
    # Quarto wants a cell's source as a list of lines.
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)} for text in texts]
    return committed | {"nbformat_minor": 4, "cells": cells}


if __name__ == "__main__":
    # Bytes, not text: a reader's locale must not decide the encoding.
    notebook = executed_copy(json.loads(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(json.dumps(notebook).encode())
