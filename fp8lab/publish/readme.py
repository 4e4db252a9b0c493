"""``python -m fp8lab.publish.readme``: draw the README's figure from the committed records."""

from __future__ import annotations

import io
from pathlib import Path

import typer

from fp8lab import figures
from fp8lab.analysis.occasions import SpeedRun, speed_runs
from fp8lab.records import write_atomically

FIGURE = Path("assets/speed.svg")
DEVICE = "NVIDIA H200"
"""The README shows one device's speed; the article shows every device's."""


def occasions(records_dir: Path) -> list[SpeedRun]:
    """What the figure is drawn from: whole models, timed on `DEVICE`."""
    return [speed for speed in speed_runs(records_dir) if speed.device == DEVICE]


def draw(records_dir: Path) -> bytes:
    """The throughput figure as SVG: the same records give the same bytes."""
    figures.style.use_style()
    buffer = io.BytesIO()
    figures.speed.throughput(occasions(records_dir)).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main() -> None:
    """Draw the README's figure again, from the committed records."""
    write_atomically(FIGURE, draw(Path("runs/records")))
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    typer.run(main)
