"""What a chapter depends on is read off its imports, so that none of it can change unnoticed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fp8lab.publish import read_book
from fp8lab.publish.dependencies import PACKAGE, imported_modules, package_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def depended_on() -> set[str]:
    notebooks = [chapter.source for chapter in read_book(ROOT).chapters]
    return {path.relative_to(PACKAGE).as_posix() for path in package_files(notebooks)}


def test_every_module_that_the_chapters_load_is_one_that_they_depend_on(depended_on: set[str]) -> None:
    cells = [
        cell.source
        for chapter in read_book(ROOT).chapters
        for cell in nbformat.read(chapter.source, as_version=4).cells
        if cell.cell_type == "code"
    ]
    imports = [
        ast.unparse(node)
        for source in cells
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    show = "import sys; print(*(m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'fp8lab'))"
    code = "\n".join([*imports, show])
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {Path(path).relative_to(PACKAGE).as_posix() for path in loaded.split()}
    assert "analysis/losses.py" in names
    assert names <= depended_on


def test_tables_and_scripts_that_a_module_reads_count(depended_on: set[str]) -> None:
    assert {"analysis/published_scores.csv", "chart/chart.css", "chart/chart.js"} < depended_on
    assert {"analysis/comparison.py", "analysis/diagnosis.py", "analysis/roofline.py", "chart/switch.py"} < depended_on
    assert not {"cli.py", "publish/pandoc_edition.py"} & depended_on


MAKERS = {"training", "running", "speed", "evaluation", "benchmark", "kernels", "data", "model", "precision", "cli"}
READERS = {"analysis", "figures", "tables", "chart", "claims", "frontpage", "article", "publish"}


def imported_by(*names: str) -> set[str]:
    """Modules and packages of fp8lab that modules and packages of these names import, directly or not."""
    assert all((PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() for name in (*names, *MAKERS, *READERS))
    paths = [
        path for name in names for path in (PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")) if path.exists()
    ]
    modules = imported_modules(path.read_text() for path in paths)
    return {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules}


def test_nothing_right_of_the_record_rests_on_what_makes_records() -> None:
    assert imported_by(*READERS) & MAKERS == set()


def test_nothing_left_of_the_record_rests_on_what_reads_records() -> None:
    # The command line publishes too.
    assert imported_by(*MAKERS - {"cli"}) & READERS == set()
    assert "running" not in imported_by("training")
    assert "training" not in imported_by("running")


def test_imports_are_followed_through_functions_and_packages(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("def f():\n    import fp8lab.units\n")])
    nbformat.write(notebook, tmp_path / "one.ipynb")
    assert [path.name for path in package_files([tmp_path / "one.ipynb"])] == ["__init__.py", "units.py"]
