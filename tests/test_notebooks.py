"""A notebook is executed as asked, by a kernel that other users cannot reach."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from fp8lab import notebooks

SAY_HOW_REACHED = """
import os, stat
from ipykernel import get_connection_info

info = get_connection_info(unpack=True)
folder = os.path.dirname(info["ip"])
say({"transport": info["transport"], "folder": folder, "mode": stat.S_IMODE(os.stat(folder).st_mode)})
"""


def write_notebook(folder: Path, code: str) -> Path:
    """A notebook with the parameter `given`, whose `say` writes JSON beside it."""
    said = f"pathlib.Path({str(folder / 'said.json')!r})"
    say = f"import json, pathlib\nsay = lambda value: {said}.write_text(json.dumps(value))"
    parameters = nbformat.v4.new_code_cell("given = None", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(say), nbformat.v4.new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "source.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_no_other_user_reaches_the_kernel_and_its_sockets_go_with_it(tmp_path: Path) -> None:
    notebooks.execute_notebook(write_notebook(tmp_path, SAY_HOW_REACHED), tmp_path / "target.ipynb", {})
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["transport"] == "ipc"
    assert said["mode"] & 0o077 == 0
    assert not Path(said["folder"]).exists()


def test_a_cell_that_raises_is_raised_and_the_target_shows_it(tmp_path: Path) -> None:
    source, target = write_notebook(tmp_path, "raise RuntimeError('no such luck')"), tmp_path / "target.ipynb"
    with pytest.raises(PapermillExecutionError, match="no such luck"):
        notebooks.execute_notebook(source, target, {})
    assert "no such luck" in target.read_text()


def execute(source: Path, *, given: object = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, its working directory that of the notebook."""
    command = [sys.executable, "-m", notebooks.__name__, source, source.with_name("target.ipynb")]
    return subprocess.run(
        [*command, json.dumps({"given": given})], cwd=source.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("given", [None, True, 3, 0.5, "7M-*", ["a", "b"], "2026-11-28"])
def test_parameters_keep_their_types(tmp_path: Path, given: object) -> None:
    source = write_notebook(tmp_path, "say([given, str(pathlib.Path().resolve())])")
    assert execute(source, given=given).returncode == 0
    assert json.loads((tmp_path / "said.json").read_text()) == [given, str(tmp_path)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("raise RuntimeError('no such luck')", "no such luck"), ("import os; os._exit(1)", "Kernel died")],
)
def test_the_last_line_says_why_a_notebook_failed(tmp_path: Path, code: str, reason: str) -> None:
    result = execute(write_notebook(tmp_path, code))
    assert result.returncode != 0
    assert reason in result.stderr.strip().splitlines()[-1]
