"""The live curve draws at once, then seldom, and always at the end."""

from __future__ import annotations

import pandas as pd

from fp8lab.running import live
from fp8lab.running.live import LiveCurve
from tests.rule_data import tiny_config


def test_redraws_are_seldom_and_the_last_state_is_drawn(monkeypatch) -> None:
    draws, now = [], [0.0]

    class Handle:
        def update(self, figure) -> None:
            draws.append(figure.axes[0].lines[0].get_xdata()[-1])

    def display(figure, display_id):
        draws.append(figure.axes[0].lines[0].get_xdata()[-1])
        return Handle()

    monkeypatch.setattr(live, "display", display)
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    curve = LiveCurve(tiny_config())
    for second in range(1, 13):
        now[0] = float(second)
        metrics = pd.DataFrame({"tokens": range(second), "loss": 3.0})
        validation = pd.DataFrame({"tokens": [1], "domain": ["odd"], "loss": [3.0]})
        curve.update(lambda metrics=metrics: metrics, lambda validation=validation: validation)
    assert draws == [0, 5, 10]
    curve.close()
    assert draws == [0, 5, 10, 11]
    axes = curve._figure.axes[0]
    assert axes.get_xlabel() == "tokens"
    assert "nats" in axes.get_ylabel()
