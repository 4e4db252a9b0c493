"""Quarto's ``pre-render``: execute stale chapters with the Python that has fp8lab's packages.

``quarto render`` may be called from any shell, so that Python is looked for: QUARTO_PYTHON, then the
.venv that ``make`` made, then whichever Python runs this. Only the standard library is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HAS_PACKAGES = "import importlib.util as u; raise SystemExit(not (u.find_spec('papermill') and u.find_spec('seaborn')))"


def main() -> int:
    candidates = [os.environ.get("QUARTO_PYTHON"), str(ROOT / ".venv" / "bin" / "python"), sys.executable]
    for python in candidates:
        if python and Path(python).exists() and subprocess.run([python, "-c", HAS_PACKAGES]).returncode == 0:
            return subprocess.run([python, "-m", "fp8lab.publish"], cwd=ROOT).returncode
    print("fp8lab: no Python with fp8lab's packages was found; 'make install' makes one in .venv", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
