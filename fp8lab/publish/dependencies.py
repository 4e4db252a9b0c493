"""Which of fp8lab's files a notebook depends on: the modules that it imports, directly or not, and their data files."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat

import fp8lab

PACKAGE = Path(fp8lab.__file__).parent


def package_files(notebooks: Iterable[Path]) -> list[Path]:
    """Files of the package that the code cells of `notebooks` depend on, sorted.

    A data file (a table, a style, a script) counts where a module in the same folder names it.
    """
    modules = imported_modules(_code(notebook) for notebook in notebooks)
    return sorted(modules | {data for path in modules for data in _data_files(path)})


def imported_modules(sources: Iterable[str]) -> set[Path]:
    """Files of the package's modules that Python `sources` import, directly or not.

    They are found by reading imports, those inside functions too, without executing any.
    """
    found: set[Path] = set()
    waiting = [module for source in sources for module in _imported(source)]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += _imported(path.read_text(encoding="utf-8"))
    return found


def _code(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def _imported(source: str) -> Iterator[Path]:
    """Files of the modules of this package that `source` imports, and of the packages that hold them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield from _files(name)


def _files(name: str) -> Iterator[Path]:
    """Nothing for a name that is no module of this package: of a function, or of another package."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return
    for depth in range(1, len(parts) + 1):
        place = PACKAGE.parent.joinpath(*parts[:depth])
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists())


def _data_files(module: Path) -> Iterator[Path]:
    source = module.read_text(encoding="utf-8")
    for path in module.parent.iterdir():
        if path.is_file() and path.suffix not in (".py", ".pyc") and f'"{path.name}"' in source:
            yield path
