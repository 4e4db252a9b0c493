"""All that the first page draws on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fp8lab import claims
from fp8lab.analysis import decision, losses, numerics, slopes, starts
from fp8lab.analysis.decision import Matched, Payoff
from fp8lab.analysis.losses import MeasuredGap
from fp8lab.analysis.numerics import HeadCost
from fp8lab.analysis.occasions import MAP_PLAN, SpeedRun, speed_runs
from fp8lab.analysis.runs import SEEDS_PLAN, Run, RunSet, has_ladder, plan_runs, scored_runs, training_runs
from fp8lab.analysis.slopes import FittedLaw
from fp8lab.analysis.starts import Start
from fp8lab.analysis.timings import break_even, comparable, with_verdicts
from fp8lab.units import listing, unique


@dataclass(frozen=True)
class Evidence:
    """What the records say, read once."""

    runs: RunSet
    """The runs that the article shows."""
    seeds: RunSet
    """Runs of many seeds."""
    others: tuple[Run, ...]
    """Runs that a verdict, a score or a gap of the page rests on besides: of other plans, and decay branches."""
    speeds: list[SpeedRun]
    """Of whole models, and of the speed map's blocks: those that timed BF16."""
    timings: pd.DataFrame
    """`timings.with_verdicts`; empty where nothing was timed on a GPU."""
    payoffs: list[Payoff]
    """Of whole models."""
    map_payoffs: list[Payoff]
    """Of the speed map's blocks."""
    map_cells: pd.DataFrame
    """`timings.break_even`."""
    ladder: RunSet
    """Sizes enough for a trend; the runs shown where there is none."""
    matched: list[Matched]
    tuned_as_ladder: list[MeasuredGap]
    """Gaps of `matched` at the ladder's learning rate, where they have another."""
    laws: list[FittedLaw]
    head_costs: list[HeadCost]
    """In loss."""
    starts: list[Start]
    """The first minutes of larger models."""
    starts_left_out: str
    """A sentence about those that are in no gap."""
    findings: list[claims.Finding]

    @classmethod
    def read(cls, records_dir: Path) -> Evidence:
        """Everything from a folder of records."""
        runs = training_runs(records_dir)
        maps = comparable(speed_runs(records_dir, MAP_PLAN))
        speeds = [*comparable(speed_runs(records_dir)), *maps]
        timings = with_verdicts(speeds) if speeds else pd.DataFrame(columns=["kind", "device", "recipe", "head"])
        sets = losses.measured_sets(records_dir)
        laws = slopes.known_laws(sets)
        matched = decision.loss_matched(sets, laws, timings)
        plans = [plan_runs(records_dir, plan) for plan in losses.GAP_PLANS]
        plans += [runs for runs in sets if runs.plan not in losses.GAP_PLANS]
        ladder = training_runs(records_dir, suits=has_ladder) or runs
        scored = scored_runs(records_dir)
        early = starts.early_runs(records_dir)
        return cls(
            runs=runs,
            seeds=next(plan for plan in plans if plan.plan == SEEDS_PLAN),
            others=tuple(
                run for plan in (*plans, ladder, scored) if not plan.toy for run in (*plan.runs, *plan.branches)
            ),
            speeds=speeds,
            timings=timings,
            payoffs=decision.payoffs(timings[timings["kind"] == "model"]),
            map_payoffs=decision.payoffs(timings[timings["kind"] == "blocks"]),
            map_cells=break_even(maps),
            ladder=ladder,
            matched=matched,
            tuned_as_ladder=losses.tuned_as(ladder, sets, [row.measured for row in matched]),
            laws=laws,
            head_costs=numerics.best_known_head_costs(records_dir),
            starts=starts.starts(early),
            starts_left_out=starts.left_out(early),
            findings=claims.scoreboard(
                gaps=[row.measured for row in matched],
                stability=plans,
                timings=timings,
                ladder=ladder,
                scored=scored,
            ),
        )

    @property
    def drawn(self) -> list[RunSet]:
        """The runs shown and, beside those of a GPU, many seeds, which say how far one of them can be trusted."""
        return [runs for runs in (self.runs, self.seeds) if runs and runs.toy == self.runs.toy]

    @property
    def devices(self) -> str:
        """Where speed was measured."""
        return listing(unique(self.timings["device"]))

    @property
    def measured_cells(self) -> list[tuple[str, pd.DataFrame]]:
        """The speed map's measured cells, device by device."""
        cells = self.map_cells.dropna(subset=["measured"])
        return [(device, cells[cells["device"] == device]) for device in unique(cells["device"])]

    def with_head(self, head: str, device: str | None = None) -> list[Payoff]:
        """Payoffs of whole models, of one device or all."""
        return [payoff for payoff in self.payoffs if payoff.head == head and device in (None, payoff.device)]

    def timed(self, recipe: str, device: str, head: str = "bf16") -> pd.DataFrame:
        """Timings of whole models in one recipe on one device, by width and then tokens a micro-batch."""
        rows = self.timings[
            (self.timings["recipe"] == recipe)
            & (self.timings["head"] == head)
            & (self.timings["device"] == device)
            & (self.timings["kind"] == "model")
        ]
        return rows.sort_values(["width", "micro_batch_tokens"], kind="stable")
