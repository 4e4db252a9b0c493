"""The training text, drawn."""

from __future__ import annotations

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fp8lab.analysis import composition
from fp8lab.figures.style import SLATE, WIDTH, finish
from fp8lab.records import DataRecord


def data_composition(record: DataRecord, toy: bool) -> Figure:
    """Training tokens that each domain has, beside the share of them that the mixture's weights ask for."""
    domains = composition.data_composition(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), sharey=True)
    left.barh(domains["domain"], domains["train_tokens"] / 1e6, color=SLATE)
    right.barh(domains["domain"], domains["weight"], color=SLATE)
    left.invert_yaxis()
    left.set_xlabel("unique training tokens\n(millions)")
    right.set_xlabel("share of each batch")
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    finish(figure, right, [], toy)
    return figure
