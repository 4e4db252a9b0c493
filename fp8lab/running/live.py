"""The loss curve of a run in progress, redrawn in place in a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import DisplayHandle, display

from fp8lab.config import RunConfig

REDRAW_SECONDS = 5.0
MAX_POINTS = 4_000
Table = Callable[[], pd.DataFrame]


class LiveCurve:
    """Training and validation loss against tokens; hand `update` to `fp8lab.training.trainer.train` as `on_log`."""

    def __init__(self, config: RunConfig) -> None:
        self._figure, self._axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
        # The display handle draws the figure; without this the cell would draw it once more at its end.
        plt.close(self._figure)
        self._title = f"{config.plan}/{config.run}"
        self._total_tokens = config.steps * config.global_batch_tokens
        self._handle: DisplayHandle | None = None
        self._next_draw = 0.0
        self._latest: tuple[Table, Table] | None = None

    def update(self, metrics: Table, validation: Table) -> None:
        """Redraw, at most every five seconds and for at most a hundredth of the time."""
        self._latest = (metrics, validation)
        started = time.monotonic()
        if started >= self._next_draw:
            self._draw()
            ended = time.monotonic()
            self._next_draw = ended + max(REDRAW_SECONDS, 100 * (ended - started))

    def close(self) -> None:
        """Draw the last state."""
        if self._latest is not None:
            self._draw()

    def _draw(self) -> None:
        assert self._latest is not None
        metrics, validation = (table() for table in self._latest)
        metrics = metrics.iloc[:: len(metrics) // MAX_POINTS + 1]
        axes = self._axes
        axes.clear()
        axes.plot(metrics["tokens"], metrics["loss"], linewidth=0.8, label="training")
        for domain, rows in validation.groupby("domain"):
            axes.plot(rows["tokens"], rows["loss"], "o-", markersize=3, label=f"validation, {domain}")
        axes.set(title=self._title, xlabel="tokens", ylabel="loss (nats a token)", xlim=(0, self._total_tokens))
        if len(metrics):
            axes.legend(fontsize="small")
        if self._handle is None:
            self._handle = display(self._figure, display_id=True)
        else:
            self._handle.update(self._figure)
