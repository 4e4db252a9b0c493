"""The claims about benchmark scores: of small models of one's own, and of other people's."""

from __future__ import annotations

import pandas as pd

from fp8lab.analysis import scores
from fp8lab.analysis.runs import RunSet
from fp8lab.claims.finding import Finding, Verdict
from fp8lab.units import listing

BARELY = 0.05
"""Accuracy above guessing that is still 'barely' above it."""


def barely_above_guessing(runs: RunSet) -> Finding:
    """A small model of one's own is barely above guessing on the usual tasks."""
    tasks = _leads(runs) if runs and not runs.toy else pd.DataFrame()
    if tasks.empty:
        return _barely("untested", "No model trained on a GPU was scored.", "", "@tbl-published")
    above = tasks[tasks["lead"] >= BARELY].sort_values("lead", ascending=False)
    barely = len(tasks) - len(above)
    exceptions = listing([f"{task} by {100 * lead:.0f} points" for task, lead in above["lead"].items()] or ["none"])
    below = [str(task) for task in tasks.index[tasks["lead"] < -2 * tasks["stderr"]]]
    why = (
        f"Of {len(tasks)} tasks, {tasks.attrs['size']} lies less than {100 * BARELY:.0f} points above guessing on "
        f"{barely}; above that: {exceptions}." + (f" On {listing(below)} it lies below guessing." if below else "")
    )
    verdict: Verdict = "confirmed" if barely > len(tasks) / 2 else "contradicted"
    agreeing = barely if verdict == "confirmed" else len(above)
    return _barely(verdict, why, f"on {agreeing} of {len(tasks)} tasks", "@fig-scores")


def _leads(runs: RunSet) -> pd.DataFrame:
    """Accuracy above guessing by task, in its usual metric: means over the scored runs of the largest size."""
    known = scores.usual_accuracies(runs).dropna(subset=["random_guess", "stderr"])
    largest = [size for size in runs.sizes if size in set(known["size"])][-1:]
    of_largest = known[known["size"].isin(largest)]
    leads = of_largest.assign(lead=of_largest["value"] - of_largest["random_guess"])
    table = leads.groupby("task", sort=False)[["lead", "stderr"]].mean()
    table.attrs["size"] = listing(largest) if largest else ""
    return table


def _barely(verdict: Verdict, why: str, scope: str, reference: str) -> Finding:
    return Finding(
        claim="A small model of one's own scores barely above guessing.",
        verdict=verdict,
        why=why,
        rule=(
            "By each task's usual accuracy, of the largest model scored: confirmed where it is less than "
            f"{100 * BARELY:.0f} points above guessing on more than half of the tasks, the others named, contradicted "
            "otherwise"
        ),
        reference=reference,
        scope=scope,
    )


def other_models() -> Finding:
    """What the report says of other people's models: not run here."""
    return Finding(
        claim="Remarks on Llama's and Qwen's scores.",
        verdict="untested",
        why="We ran none of these models; their published scores stand beside the remarks.",
        rule="It would need our own scores of those models",
        reference="@tbl-published",
    )
