"""Executing one notebook: papermill, with a kernel that nobody but this user can reach.

Jupyter reaches its kernels over TCP by default. Its ports are open to every user of the machine, and they are found by
opening and closing them: of kernels that start at once, two may be given the same one, and one then dies. Sockets in a
folder of their own have neither fault.

``python -m fp8lab.notebooks SOURCE TARGET PARAMETERS`` does it in a process that can be watched and stopped, with the
parameters in JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def execute_notebook(source: Path, target: Path, parameters: Mapping[str, Any], cwd: Path | None = None) -> None:
    """Execute the notebook `source` into `target`, which is written after every cell.

    Args:
        cwd: the kernel's working directory; this process's by default.

    Raises:
        papermill.PapermillExecutionError: a cell raised.
        nbclient.exceptions.DeadKernelError: the kernel died.
    """
    import papermill
    from traitlets.config import Config

    # The path of a Unix socket has about a hundred characters at most, so they are in no folder of the project.
    with tempfile.TemporaryDirectory(prefix="fp8lab-") as sockets:
        papermill.execute_notebook(
            source,
            target,
            parameters=dict(parameters),
            kernel_name="python3",
            cwd=cwd,
            progress_bar=False,
            log_output=False,
            # A kernel logs its own orderly end as an error.
            extra_arguments=["--log-level=CRITICAL"],
            config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
        )


if __name__ == "__main__":
    execute_notebook(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
