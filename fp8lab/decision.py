"""Should I switch on FP8? What the records say of it, by width, memory, tokens a micro-batch and loss.

A recipe *is faster* at a setting where it beat BF16 in every round timed there, and *slower* where it lost in
every round. It *pays from a width on* where it is faster at every setting of that width and of all wider ones
that were timed; it pays *never* where it is faster at none. Rounds of one process are no confidence interval:
they say what this machine did, on these occasions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from fp8lab import matched, tables
from fp8lab.comparison import Gap
from fp8lab.config import MODELS, RECIPES, parameter_count
from fp8lab.matched import Estimate, Slope
from fp8lab.results import (
    LARGER_PLAN,
    MEASURED_PLANS,
    SEEDS_PLAN,
    Run,
    RunSet,
    SpeedRun,
    plan_runs,
    seed_deviation,
    unique,
)
from fp8lab.scaling import BESIROGLU
from fp8lab.units import number

GAP_PLANS = (SEEDS_PLAN, *MEASURED_PLANS, LARGER_PLAN)
"""Plans whose runs a loss gap may come from; of a size in several, the one with most seeds counts, then the first."""
TOKENS_PER_PARAMETER = 20
"""For what a loss costs at sizes that were timed and not trained."""


def timings(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """`tables.speed_ratios` of each device, with what a decision needs.

    Returns:
        Its columns, and: device, width (d_model), micro_batch_tokens, memory_ratio (peak over BF16's at the same
        setting), verdict ('faster', 'slower' or 'unclear', over rounds), runs ('plan/run' of each occasion), commits.
    """
    frames = []
    for device in unique(speed.record.provenance.device_name for speed in speeds):
        of_device = [speed for speed in speeds if speed.record.provenance.device_name == device]
        ratios = tables.speed_ratios(of_device)
        bf16_memory = ratios[(ratios["recipe"] == "bf16") & (ratios["head"] == "bf16")].set_index("setting")[
            "peak_memory_bytes"
        ]
        widths = {name: width for speed in of_device for name, width in _widths(speed).items()}
        occasions = {case: _occasions(of_device, case) for case in unique(ratios["case"])}
        frames.append(
            ratios.assign(
                device=device,
                width=ratios["model"].map(widths),
                micro_batch_tokens=ratios["micro_batch"] * ratios["seq_len"],
                memory_ratio=ratios["peak_memory_bytes"] / ratios["setting"].map(bf16_memory),
                verdict=[_verdict(low, high) for low, high in zip(ratios["low"], ratios["high"], strict=True)],
                runs=[", ".join(f"{s.record.plan}/{s.record.run}" for s in occasions[case]) for case in ratios["case"]],
                commits=[
                    ", ".join(unique(s.record.provenance.git_commit[:7] for s in occasions[case]))
                    for case in ratios["case"]
                ],
            )
        )
    return pd.concat(frames, ignore_index=True)


def _widths(speed: SpeedRun) -> dict[str, int]:
    """d_model of every model that was timed: named sizes, and those with dimensions of their own in the plan."""
    named = {name: model.d_model for name, model in MODELS.items()}
    own = {case["model"]["name"]: case["model"]["d_model"] for case in speed.record.config.get("cases", [])}
    return named | own


def _occasions(speeds: Sequence[SpeedRun], case: str) -> list[SpeedRun]:
    return [
        speed
        for speed in speeds
        if case in {f"{m}-T{t}-B{b}" for m, t, b in speed.steps[["model", "seq_len", "micro_batch"]].to_numpy()}
    ]


def _verdict(low: float, high: float) -> str:
    return "faster" if low > 1 else "slower" if high < 1 else "unclear"


@dataclass(frozen=True)
class Payoff:
    """At which widths a recipe is faster than BF16, over all devices and settings timed."""

    recipe: str
    head: str
    widths: tuple[int, ...]
    """Those that were timed, ascending."""
    pays_from: int | None
    """Narrowest width from which on it is faster at every setting; None where it is not at the widest."""
    faster: int
    """Settings at which it is."""
    settings: int
    slowest: float
    """Smallest and largest ratio to BF16 at the settings from `pays_from` on; at all of them where that is None."""
    fastest: float

    @property
    def never(self) -> bool:
        return self.faster == 0


def payoffs(table: pd.DataFrame) -> list[Payoff]:
    """Of every FP8 recipe and head in `timings`, the widest gain first."""
    found = []
    for (recipe, head), rows in table[table["recipe"].isin(RECIPES[1:])].groupby(["recipe", "head"], sort=False):
        widths = sorted(set(rows["width"]))
        faster = rows["verdict"] == "faster"
        paying = [width for width in widths if faster[rows["width"] >= width].all()]
        pays_from = min(paying) if paying else None
        counted = rows if pays_from is None else rows[rows["width"] >= pays_from]
        found.append(
            Payoff(
                recipe=str(recipe),
                head=str(head),
                widths=tuple(widths),
                pays_from=pays_from,
                faster=int(faster.sum()),
                settings=len(rows),
                slowest=float(counted["ratio"].min()),
                fastest=float(counted["ratio"].max()),
            )
        )
    return sorted(found, key=lambda payoff: (payoff.pays_from or float("inf"), -payoff.fastest))


@dataclass(frozen=True)
class MeasuredGap:
    """What a recipe cost in loss at one size, on a GPU."""

    size: str
    recipe: str
    gap: Gap
    runs: RunSet
    slope: Slope
    assumed: bool = False
    """Whether the gap's interval is assumed: one seed, taken to scatter as smaller models do."""


def measured_gaps(records_dir: Path) -> list[MeasuredGap]:
    """The gap of every size and recipe that was trained on a GPU, from the plan that has most seeds of it."""
    sets = [runs for plan in GAP_PLANS if (runs := plan_runs(records_dir, plan)) and not runs.toy]
    best: dict[tuple[str, str], RunSet] = {}
    for runs in sets:
        for key, gap in runs.gaps().items():
            if key not in best or gap.seeds > best[key].gap(*key).seeds:
                best[key] = runs
    by_size = sorted(best.items(), key=lambda item: item[1].where(size=item[0][0])[0].parameters)
    return [_measured_gap(sets, runs, *key) for key, runs in by_size]


def _measured_gap(sets: Sequence[RunSet], runs: RunSet, size: str, recipe: str) -> MeasuredGap:
    gap, bf16 = runs.gap(size, recipe), runs.where(size=size, recipe="bf16")[0]
    slope = slope_at(sets, bf16)
    smaller = seed_deviation(sets, below=bf16.parameters) if gap.interval is None else None
    if smaller is None:
        return MeasuredGap(size, recipe, gap, runs, slope)
    return MeasuredGap(size, recipe, replace(gap, interval=gap.assumed_interval(smaller)), runs, slope, assumed=True)


def slope_at(sets: Sequence[RunSet], run: Run) -> Slope:
    """The slope of the loss at the end of `run`: from decay branches of its size, or from a published law."""
    for runs in sets:
        ends = [end for end in (*runs.runs, *runs.branches) if (end.size, end.recipe) == (run.size, run.recipe)]
        tokens, losses = [end.record.tokens for end in ends], [end.validation_loss for end in ends]
        if len(set(tokens)) > 1 and max(tokens) == run.record.tokens:
            return Slope(matched.measured_slope(tokens, losses), "decay branches")
    return Slope(matched.law_slope(BESIROGLU, run.record.tokens), "published law")


@dataclass(frozen=True)
class Matched:
    """Speed and loss of one recipe at one size, put together."""

    measured: MeasuredGap
    tokens: Estimate
    """Tokens for BF16's loss over BF16's tokens."""
    ratio: Estimate | None
    """Tokens a second over BF16's; None where this size was not timed."""
    device: str | None
    speedup: Estimate | None


def loss_matched(records_dir: Path, speeds: Sequence[SpeedRun]) -> list[Matched]:
    """The loss-matched speed-up of every recipe and size that was trained on a GPU, and timed where `ratio` is given.

    Speed is the speed map's, of the size with the run's own head and, where there are several settings, on the run's
    device and with most tokens a micro-batch.
    """
    table = timings(speeds) if speeds else pd.DataFrame()
    found = []
    for measured in measured_gaps(records_dir):
        tokens = matched.token_factors(measured.gap, measured.slope.nats)
        timed = _timing(table, measured)
        if timed is None:
            found.append(Matched(measured, tokens, None, None, None))
            continue
        ratio = Estimate(float(timed["ratio"]), (float(timed["low"]), float(timed["high"])))
        speedup = matched.loss_matched(ratio, measured.gap, measured.slope.nats)
        found.append(Matched(measured, tokens, ratio, str(timed["device"]), speedup))
    return found


def _timing(table: pd.DataFrame, measured: MeasuredGap) -> pd.Series | None:
    if table.empty:
        return None
    run = measured.runs.where(size=measured.size, recipe=measured.recipe)[0]
    rows = table[
        (table["model"] == measured.size)
        & (table["recipe"] == measured.recipe)
        & (table["head"] == run.record.head)
        & (table["width"] == run.record.model.d_model)
    ]
    if rows.empty:
        return None
    here = rows[rows["device"] == run.record.provenance.device_name]
    return (rows if here.empty else here).sort_values("micro_batch_tokens").iloc[-1]


def matched_table(found: Sequence[Matched]) -> pd.DataFrame:
    """`loss_matched` for reading."""
    rows = []
    for row in found:
        measured = row.measured
        rows.append(
            {
                "model": measured.size,
                "recipe": measured.recipe,
                "seeds": f"{measured.gap.seeds}{' (scatter assumed)' if measured.assumed else ''}",
                "slope": f"{measured.slope.nats:.3f} ({measured.slope.source})",
                "tokens, × BF16": row.tokens.text(3),
                "tokens/s, × BF16": row.ratio.text() if row.ratio else "not timed",
                "loss-matched speed-up": row.speedup.text() if row.speedup else "–",
            }
        )
    return pd.DataFrame(rows)


def switch_table(table: pd.DataFrame) -> pd.DataFrame:
    """`timings` for a decision: a row a setting and FP8 recipe, narrow models first.

    The loss that a gain would pay for is a prediction, and only of models that have a name: see `affordable_gap`.
    """
    chosen = table[table["recipe"].isin(RECIPES[1:])].sort_values(["width", "micro_batch_tokens"], kind="stable")
    rows = []
    for _, row in chosen.iterrows():
        affordable = row["ratio"] > 1 and row["model"] in MODELS
        rows.append(
            {
                "width": f"{row['width']:,}",
                "recipe": row["recipe"] + (" + head" if row["head"] == "fp8" else ""),
                "tokens/s, × BF16": f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})",
                "faster": {"faster": "yes", "slower": "no"}.get(row["verdict"], "unclear"),
                "GiB (× BF16)": f"{row['peak_memory_bytes'] / 2**30:.0f} ({row['memory_ratio']:.2f})",
                "pays for (nats)": f"{affordable_gap(row['model'], row['ratio']):.3f}" if affordable else "–",
                "tokens a step": number(row["micro_batch_tokens"]),
                "model": row["model"],
                "device": row["device"].removeprefix("NVIDIA "),
            }
        )
    found = pd.DataFrame(rows)
    return found if table["device"].nunique() > 1 else found.drop(columns="device")


def affordable_gap(model: str, ratio: float) -> float:
    """Loss (nats) that a ratio of speeds would pay for at a named size: published law, 20 tokens a parameter."""
    tokens = TOKENS_PER_PARAMETER * parameter_count(MODELS[model])
    return matched.affordable_gap(ratio, matched.law_slope(BESIROGLU, tokens))


def chart_points(table: pd.DataFrame, runs: RunSet) -> pd.DataFrame:
    """What the first page's chart draws, interactive or not: timed settings, and trained runs.

    Args:
        table: `timings`, or an empty frame.
        runs: the runs shown, maybe none.

    Returns:
        A row a point. Columns: panel ('speed' or 'loss'), series (recipe), hollow (head in FP8), x, tick (what x is
        called), y, low, high (NaN without an interval), title, facts (dict of what a reader sees of the record).
    """
    points = []
    if len(table):
        points += [_speed_point(row) for _, row in table[table["recipe"] != "bf16"].iterrows()]
    if runs:
        baselines = {
            size: sum(losses) / len(losses)
            for size in runs.sizes
            if (losses := [run.validation_loss for run in runs.where(size=size, recipe="bf16")])
        }
        points += [_loss_point(run, baselines[run.size]) for run in runs.runs if run.size in baselines]
    columns = ["panel", "series", "hollow", "x", "tick", "y", "low", "high", "title", "facts"]
    return pd.DataFrame(points, columns=columns)


def _speed_point(row: pd.Series) -> dict[str, object]:
    head = ", head in FP8 too" if row["head"] == "fp8" else ""
    return {
        "panel": "speed",
        "series": row["recipe"],
        "hollow": row["head"] == "fp8",
        "x": float(row["width"]),
        "tick": f"{row['width']:,}",
        "y": row["ratio"],
        "low": row["low"],
        "high": row["high"],
        "title": f"{row['recipe']}{head} at {row['model']}",
        "facts": {
            "× BF16's tokens/s": f"{row['ratio']:.3f}",
            "range": f"{row['low']:.3f} to {row['high']:.3f}, {row['rounds']} rounds",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "step": f"{row['step_ms']:.1f} ms",
            "width": f"{row['width']:,}",
            "micro-batch": f"{row['micro_batch']} × {row['seq_len']:,} = {row['micro_batch_tokens']:,} tokens",
            "peak memory": f"{row['peak_memory_bytes'] / 2**30:.1f} GiB, {row['memory_ratio']:.2f} of BF16's",
            "device": row["device"],
            "record": row["runs"],
            "commit": row["commits"],
        },
    }


def _loss_point(run: Run, baseline: float) -> dict[str, object]:
    record = run.record
    difference = run.validation_loss - baseline
    facts = {
        "validation loss": f"{run.validation_loss:.4f} nats/token",
        "minus BF16's mean at this size": f"{difference:+.4f}".replace("-", "−"),
        "parameters, width": f"{number(run.parameters)}, {record.model.d_model:,}",
        "trained on": f"{number(record.tokens)} tokens",
        "seed": str(record.seed),
    }
    if record.speed and not record.emulated and record.speed.peak_memory_bytes:
        shared = record.provenance.concurrent_runs
        facts["tokens/s"] = f"{record.speed.tokens_per_second_median:,.0f}" + (
            f", with {shared} runs on the GPU at once" if shared > 1 else ""
        )
        facts["peak memory"] = f"{record.speed.peak_memory_bytes / 2**30:.1f} GiB"
    facts |= {
        "device": record.provenance.device_name + (", FP8 emulated" if record.emulated else ""),
        "record": f"{record.plan}/{record.run}",
        "commit": record.provenance.git_commit[:7],
    }
    return {
        "panel": "loss",
        "series": run.recipe,
        "hollow": record.head == "fp8",
        "x": float(run.parameters),
        "tick": run.size,
        "y": difference,
        "low": float("nan"),
        "high": float("nan"),
        "title": f"{run.recipe} at {run.size}, seed {record.seed}",
        "facts": facts,
    }
