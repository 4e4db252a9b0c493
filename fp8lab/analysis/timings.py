"""Timed steps, ready to be compared: ratios to BF16 with their intervals, and what was predicted beside them.

Frames have plain column names and raw numbers; `fp8lab.tables` and `fp8lab.figures` show them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fp8lab.analysis import roofline
from fp8lab.analysis.occasions import MAP_PLAN, SpeedRun
from fp8lab.analysis.rounds import MIN_OCCASIONS, MIN_ROUNDS, Occasion, SpeedRatio, apart, settled_count, side
from fp8lab.config import MODELS, ModelConfig
from fp8lab.errors import UserError
from fp8lab.units import listing, unique

BF16_CONTESTANTS = ("bf16", "te_bf16")
"""What is timed in BF16: ours, and Transformer Engine's. FP8 is held against the faster of the two."""
ON_OUR_KERNELS = ("fused", "fused_precise", "fused_e5m2")
"""Recipes that run on this project's kernels, which change: an occasion with older ones tells nothing of them now."""
BUSY = 0.9
"""Share of a step from which on the GPU counts as working through it; below, it waits for the host to queue kernels."""
LONG_TURN_SECONDS = 1.0
"""Shorter turns are at the mercy of whatever else the host does in them."""
SETTING = ["device", "model", "seq_len", "micro_batch"]


def comparable(speeds: Sequence[SpeedRun]) -> list[SpeedRun]:
    """The occasions that timed BF16 at some setting: BF16 needs most memory, and where it has too little there is none.

    What is left out, `not_timed` names.
    """
    return [speed for speed in speeds if not _compared_steps([speed]).empty]


def _compared_steps(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """Every timed step of the settings at which its occasion timed BF16 too: at others there is no ratio."""
    steps = pd.concat([speed.steps for speed in speeds], ignore_index=True)
    groups = [steps[name] for name in (*SETTING, "occasion")]
    return steps[_is_bf16(steps).groupby(groups).transform("any").astype(bool)]


def _is_bf16(steps: pd.DataFrame) -> pd.Series:
    return steps["recipe"].isin(BF16_CONTESTANTS) & (steps["head"] == "bf16")


def not_timed(speeds: Sequence[SpeedRun]) -> list[str]:
    """Contestants that nothing could be timed of, the settings of each and why, and settings timed without BF16."""
    timed = {(case, name) for speed in speeds for case, own in speed.cases.items() for name in own["contestants"]}
    failures: dict[tuple[str, str], list[str]] = {}
    for speed in speeds:
        for name, error in speed.failures().items():
            case, _, contestant = name.partition(", ")
            if (case, contestant) not in timed:
                reason = textwrap.shorten(error.partition(". ")[0], 120, placeholder=" …")
                failures.setdefault((contestant, reason), []).append(case)
    compared = {case for speed in speeds for case in _cases(_compared_steps([speed]))}
    alone = unique(case for speed in speeds for case in _cases(speed.steps) if case not in compared)
    without_steps = [_occasion(speed) for speed in speeds if speed.steps.empty and not speed.failures()]
    return [
        *(
            f"{contestant + ' at ' if contestant else ''}{listing(unique(cases))} ({reason})"
            for (contestant, reason), cases in failures.items()
        ),
        *(f"{case} (no BF16 beside it)" for case in alone),
        *(f"{occasion} (ended before its first round)" for occasion in without_steps),
    ]


def _occasion(speed: SpeedRun) -> str:
    return f"{speed.record.plan}/{speed.record.run}"


def speed_ratios(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """Speed of each recipe against the fastest BF16 timed in the same process, each device apart.

    Ratio and interval are those of `fp8lab.analysis.rounds`: of the settled rounds, and of several occasions
    together, of what is `ON_OUR_KERNELS` those with the latest kernels, and of what `MIN_OCCASIONS` timed in turns of
    `LONG_TURN_SECONDS` those alone. Settings that an occasion did not time in BF16 are left out.

    Returns:
        A row a device, setting (model, context, micro-batch) and recipe. Columns: device, model, case, seq_len,
        micro_batch, setting, recipe, head, baseline (the BF16 that was fastest, of the last occasion), baselines (of
        all that count), step_ms (median of the settled rounds), tokens_per_second, ratio, interval_low, interval_high
        (95%, NaN where too few rounds give none), low, high (smallest and largest of all rounds), first, last (rounds
        of the occasion that drifted most), drift (from the one to the other, relative), rounds (of all occasions),
        left_out (those of occasions too short to count), occasions (those with rounds enough for an interval, `apart`
        in time), timed_on (names of all), peak_memory_bytes.
    """
    steps = _compared_steps(speeds)
    if steps.empty:
        occasions = ", ".join(_occasion(speed) for speed in speeds)
        raise UserError(f"{occasions}: no BF16 step was timed, so there is nothing to hold FP8's speed against")
    rounds = (
        steps.groupby([*SETTING, "recipe", "head", "occasion", "round"], sort=False)
        .agg(
            step_ms=("step_ms", "median"),
            turn_ms=("step_ms", "sum"),
            tokens=("tokens", "first"),
            memory=("peak_memory_bytes", "max"),
        )
        .reset_index()
    )
    rounds["is_settled"] = _is_settled(rounds)
    rounds = rounds.merge(_baselines(rounds), on=[*SETTING, "occasion", "round"])
    rounds["ratio"] = rounds["bf16_ms"] / rounds["step_ms"]
    rounds["has_interval"] = _has_interval(rounds)
    spans = {_occasion(speed): speed.span for speed in speeds}
    rounds = _of_long_turns(_with_latest_kernels(rounds, speeds), spans)
    several = rounds["device"].nunique() > 1
    table = pd.DataFrame(
        [
            _ratio_row(group.sort_values("round", kind="stable"), several, spans)
            for _, group in rounds.groupby([*SETTING, "recipe", "head"], sort=False)
        ]
    )
    order = table["setting"].map({setting: index for index, setting in enumerate(_by_speed(table))})
    return table.assign(order=order).sort_values("order", kind="stable").drop(columns="order").reset_index(drop=True)


def _with_latest_kernels(rounds: pd.DataFrame, speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """`rounds` without those on our kernels that were timed with later ones too, at the same setting and head.

    An occasion of too few rounds for an interval does not make earlier ones out of date.
    """
    in_time = sorted(speeds, key=lambda speed: speed.record.provenance.started_utc)
    names = [_occasion(speed) for speed in in_time]
    kernels = {_occasion(speed): speed.kernels for speed in speeds}
    groups = [rounds[name] for name in (*SETTING, "recipe", "head")]
    when = rounds["occasion"].map(names.index)
    last = when.where(rounds["has_interval"]).groupby(groups).transform("max")
    last = last.fillna(when.groupby(groups).transform("max")).astype(int)
    is_latest = rounds["occasion"].map(kernels) == last.map(lambda index: kernels[names[index]])
    ours = rounds["recipe"].isin(ON_OUR_KERNELS) | (rounds["head"] == "fp8")
    return rounds[is_latest | ~ours]


def _of_long_turns(rounds: pd.DataFrame, spans: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """`rounds` without those of short turns, of contestants that `MIN_OCCASIONS` timed in long ones at the setting.

    An occasion's turns at a setting are as long as its shortest, whoever's it is: whether an occasion counts must not
    depend on how fast a contestant was.

    Args:
        spans: beginning and end of each occasion.
    """
    setting, contestant = ([rounds[name] for name in names] for names in (SETTING, (*SETTING, "recipe", "head")))
    turns = rounds["turn_ms"].groupby([*contestant, rounds["occasion"]]).transform("median")
    is_long = turns.groupby([*setting, rounds["occasion"]]).transform("min") >= 1e3 * LONG_TURN_SECONDS
    names = rounds["occasion"].where(is_long & rounds["has_interval"])
    occasions = names.groupby(contestant).transform(lambda own: apart(spans[name] for name in own.dropna().unique()))
    return rounds[is_long | (occasions < MIN_OCCASIONS)]


def _baselines(rounds: pd.DataFrame) -> pd.DataFrame:
    """The rounds of each occasion's fastest BF16. Columns: those of a setting, occasion, round, bf16_ms, baseline."""
    bf16 = rounds[_is_bf16(rounds)]
    fastest = [
        min((own for _, own in of_occasion.groupby("recipe", sort=False)), key=_settled_ms)
        for _, of_occasion in bf16.groupby([*SETTING, "occasion"], sort=False)
    ]
    columns = [*SETTING, "occasion", "round", "step_ms", "recipe"]
    return pd.concat(fastest)[columns].rename(columns={"step_ms": "bf16_ms", "recipe": "baseline"})


def _is_settled(rounds: pd.DataFrame) -> pd.Series:
    """Which rounds count: of each contestant and occasion the last ones."""
    own = rounds.sort_values("round", kind="stable").groupby([*SETTING, "recipe", "head", "occasion"], sort=False)
    return own.cumcount(ascending=False) < own["round"].transform("size").map(settled_count)


def _has_interval(rounds: pd.DataFrame) -> pd.Series:
    """Which rounds are of a contestant and occasion that have enough of them for an interval."""
    own = rounds.groupby([*SETTING, "recipe", "head", "occasion"], sort=False)
    return own["round"].transform("nunique") >= MIN_ROUNDS


def _settled_ms(rounds: pd.DataFrame) -> float:
    """Median step (ms) of one contestant's settled rounds, each occasion's own."""
    return float(rounds["step_ms"][rounds["is_settled"]].median())


def _ratio_row(group: pd.DataFrame, several_devices: bool, spans: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """A row of `speed_ratios` from the rounds of one setting, recipe and head."""
    first = group.iloc[0]
    by_occasion = group.groupby("occasion", sort=False)["ratio"]
    occasions = {name: Occasion(tuple(own.to_numpy())) for name, own in by_occasion}
    ratio = SpeedRatio(tuple(occasions.values()))
    counted = group[group["occasion"].isin([name for name, own in occasions.items() if own in ratio.counted])]
    low, high = ratio.interval or (float("nan"), float("nan"))
    step_ms, furthest = _settled_ms(counted), ratio.furthest
    return {
        "device": first["device"],
        "model": first["model"],
        "case": _case(first["model"], first["seq_len"], first["micro_batch"]),
        "seq_len": first["seq_len"],
        "micro_batch": first["micro_batch"],
        "setting": _setting(
            first["model"], first["seq_len"], first["micro_batch"], first["device"] if several_devices else None
        ),
        "recipe": first["recipe"],
        "head": first["head"],
        "baseline": group["baseline"].iloc[-1],
        "baselines": tuple(unique(counted["baseline"])),
        "step_ms": step_ms,
        "tokens_per_second": float(first["tokens"]) / step_ms * 1e3,
        "ratio": ratio.value,
        "interval_low": low,
        "interval_high": high,
        "low": float(group["ratio"].min()),
        "high": float(group["ratio"].max()),
        "first": furthest.ratios[0],
        "last": furthest.ratios[-1],
        "drift": furthest.drift,
        "rounds": len(group),
        "left_out": len(group) - len(counted),
        "occasions": apart(spans[str(name)] for name, own in occasions.items() if own in ratio.conclusive),
        "timed_on": tuple(unique(group["occasion"])),
        "peak_memory_bytes": int(group["memory"].max()),
    }


def fp8_only(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of contestants that compute in FP8."""
    return table[~table["recipe"].isin(BF16_CONTESTANTS)]


def short_device(name: str) -> str:
    """'H100' of 'NVIDIA H100 80GB HBM3'."""
    return name.removeprefix("NVIDIA ").partition(" ")[0]


def device_label(name: str, device: str) -> str:
    """Label of the figure or table `name` of one device: 'throughput-h100-80gb-hbm3'."""
    return f"{name}-{re.sub('[^a-z0-9]+', '-', device.removeprefix('NVIDIA ').lower()).strip('-')}"


def warmup_losses(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """Whether each contestant's loss follows BF16's, over the steps that both trained before any was timed.

    They start from the same weights, on the same batches and with the same learning rate.

    Returns:
        A row an occasion, case, recipe and head but BF16's. Columns: device, occasion, case, contestant, steps, first,
        last (losses, nats/token), bf16_last, mean_difference (over the second half of the steps), largest_difference.
    """
    rows = []
    for speed in speeds:
        for case, results in speed.cases.items():
            losses = {
                name: np.array(contestant["warmup_losses"])
                for name, contestant in results["contestants"].items()
                if contestant.get("warmup_losses")
            }
            if "bf16" not in losses:
                continue
            exact = losses.pop("bf16")
            for name, values in losses.items():
                difference = values - exact
                rows.append(
                    {
                        "device": speed.device,
                        "occasion": _occasion(speed),
                        "case": case,
                        "contestant": name,
                        "steps": len(values),
                        "first": float(values[0]),
                        "last": float(values[-1]),
                        "bf16_last": float(exact[-1]),
                        "mean_difference": float(difference[len(difference) // 2 :].mean()),
                        "largest_difference": float(difference[np.abs(difference).argmax()]),
                    }
                )
    return pd.DataFrame(rows)


def speed_drift(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """How far each contestant's step moved from an occasion's first round to its last, where BF16 was timed too.

    A GPU at its power limit lowers its clock as it warms up and as the weights grow less random, and a ratio from
    rounds that still drift is no steady state.

    Returns:
        A row an occasion, setting, recipe and head. Columns: occasion, setting, recipe, head, change (last round's
        median step over the first's, minus 1), bf16_change (that of our BF16 of the same process, or of a peer's where
        ours was not timed), first_clock_mhz, last_clock_mhz, power_w (medians; NaN where there are no readings).
    """
    steps = _compared_steps(speeds)
    rows = []
    several = steps["device"].nunique() > 1
    keys = ["device", "occasion", "model", "seq_len", "micro_batch", "recipe", "head"]
    for key, group in steps.groupby(keys, sort=False):
        device, occasion, model, seq_len, micro_batch, recipe, head = key
        by_round = group.groupby("round")[["step_ms", "sm_clock_mhz"]].median()
        first, last = by_round.iloc[0], by_round.iloc[-1]
        rows.append(
            {
                "occasion": occasion,
                "setting": _setting(model, seq_len, micro_batch, device if several else None),
                "recipe": recipe,
                "head": head,
                "change": float(last["step_ms"] / first["step_ms"] - 1),
                "first_clock_mhz": float(first["sm_clock_mhz"]),
                "last_clock_mhz": float(last["sm_clock_mhz"]),
                "power_w": float(group["power_w"].median()),
            }
        )
    drift = pd.DataFrame(rows)
    process = ["occasion", "setting"]
    return drift.join(_bf16_by(process, drift)["change"].rename("bf16_change"), on=process)


def _bf16_by(keys: list[str], table: pd.DataFrame) -> pd.DataFrame:
    """The row of our BF16 by `keys`, or of a peer's where ours was not timed."""
    bf16 = table[_is_bf16(table)].sort_values("recipe", key=lambda names: names.map(BF16_CONTESTANTS.index))
    return bf16.drop_duplicates(keys).set_index(keys)


def most_flattered(speeds: Sequence[SpeedRun]) -> pd.Series | None:
    """The row of `speed_drift` whose FP8 steps grew most beside BF16's: its first rounds flatter FP8 most."""
    drift = fp8_only(speed_drift(speeds))
    beside_bf16 = drift["change"] - drift["bf16_change"]
    return drift.iloc[int(beside_bf16.to_numpy().argmax())] if len(drift) else None


def _setting(model: object, seq_len: object, micro_batch: object, device: object = None) -> str:
    """How figures and tables call what a step was timed with; with the device where there are several."""
    setting = f"{model}, T {seq_len}, {micro_batch} sequences"
    return setting if device is None else f"{setting}, {short_device(str(device))}"


def _case(model: object, seq_len: object, micro_batch: object) -> str:
    """How a speed record names it."""
    return f"{model}-T{seq_len}-B{micro_batch}"


def _by_speed(table: pd.DataFrame) -> list[str]:
    """Settings from the smallest model (most tokens/s) to the largest."""
    return unique(
        table[table["recipe"].isin(BF16_CONTESTANTS)].sort_values("tokens_per_second", ascending=False)["setting"]
    )


def with_verdicts(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """`speed_ratios` of each device, and of whole models and the speed map's blocks, with what a decision needs.

    Args:
        speeds: `comparable` ones.

    Returns:
        Its columns, and: kind ('model', or 'blocks' of the speed map), width (d_model), micro_batch_tokens,
        memory_ratio (peak over our BF16's at the same setting, or over a peer's where ours was not timed), verdict
        ('faster' or 'slower' where the interval lies above or below 1, else 'undecided'), runs ('plan/run' of each
        occasion), commits.
    """
    frames = []
    for device in unique(speed.device for speed in speeds):
        for kind in ("model", "blocks"):
            alike = [one for one in speeds if one.device == device and _kind(one) == kind]
            if alike:
                frames.append(_judged(alike).assign(device=device, kind=kind))
    return pd.concat(frames, ignore_index=True)


def _kind(speed: SpeedRun) -> str:
    return "blocks" if speed.record.plan == MAP_PLAN else "model"


def _judged(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """`with_verdicts` of one device and kind."""
    ratios = speed_ratios(speeds)
    bf16_memory = _bf16_by(["setting"], ratios)["peak_memory_bytes"]
    widths = {name: model.d_model for name, model in _models(speeds).items()}
    commits = {_occasion(speed): speed.record.provenance.git_commit[:7] for speed in speeds}
    verdicts = {"above": "faster", "below": "slower", "undecided": "undecided"}
    return ratios.assign(
        width=ratios["model"].map(widths),
        micro_batch_tokens=ratios["micro_batch"] * ratios["seq_len"],
        memory_ratio=ratios["peak_memory_bytes"] / ratios["setting"].map(bf16_memory),
        verdict=[
            verdicts[side(low, high)] for low, high in zip(ratios["interval_low"], ratios["interval_high"], strict=True)
        ],
        runs=ratios["timed_on"].map(", ".join),
        commits=[", ".join(unique(commits[name] for name in names)) for names in ratios["timed_on"]],
    )


def _models(speeds: Sequence[SpeedRun]) -> dict[str, ModelConfig]:
    """Every model that was timed: named sizes, and those with dimensions of their own in the plan."""
    own = [ModelConfig(**case["model"]) for speed in speeds for case in speed.record.config.get("cases", [])]
    return MODELS | {model.name: model for model in own}


def _cases(steps: pd.DataFrame) -> list[str]:
    return unique(_case(*timed) for timed in steps[["model", "seq_len", "micro_batch"]].to_numpy())


def roofline_against_measurement(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """Predicted beside measured ratios and steps, where `fp8lab.analysis.roofline` knows the device, model and recipe.

    Returns:
        A row a device, setting and recipe, heads in BF16. Columns: device, model, setting, recipe, predicted_ms,
        measured_ms, predicted_ratio, measured_ratio, interval_low, interval_high (`speed_ratios`).
    """
    ratios, models = speed_ratios(speeds), _models(speeds)
    rows = []
    for row in ratios.to_dict("records"):
        device, model = roofline.device_of(row["device"]), models.get(row["model"])
        if device is None or model is None or row["recipe"] not in roofline.RECIPES or row["head"] != "bf16":
            continue
        model = model.model_copy(update={"seq_len": row["seq_len"]})
        tokens = row["seq_len"] * row["micro_batch"]
        rows.append(
            {name: row[name] for name in ("device", "model", "setting", "recipe", "interval_low", "interval_high")}
            | {
                "predicted_ms": roofline.step_ms(model, tokens, row["recipe"], device),
                "measured_ms": row["step_ms"],
                "predicted_ratio": roofline.ratio(model, tokens, row["recipe"], device),
                "measured_ratio": row["ratio"],
            }
        )
    return pd.DataFrame(rows, columns=ROOFLINE_COLUMNS)


ROOFLINE_COLUMNS = [
    "device", "model", "setting", "recipe", "predicted_ms", "measured_ms", "predicted_ratio", "measured_ratio",
    "interval_low", "interval_high",
]  # fmt: skip


def break_even(maps: Sequence[SpeedRun]) -> pd.DataFrame:
    """The map of ratios by width and tokens a micro-batch: predicted for both devices, measured where records are.

    Args:
        maps: `comparable` occasions of the map's plan.

    Returns:
        A row a device, recipe, tokens and width. Columns: device ('H100'), recipe, tokens, width, predicted, measured
        (NaN where there is no record), high (upper end of its interval), busy (share of a step that the GPU works, by
        the profile of the last occasion that has one: BF16's step or the recipe's, whichever is smaller; else NaN).
    """
    frames = [roofline.map_table(device).assign(device=device.name) for device in roofline.DEVICES]
    table = pd.concat(frames, ignore_index=True).rename(columns={"ratio": "predicted"})
    measured: dict[tuple[str, str, int, int], tuple[float, float, float]] = {}
    if maps:
        for row in speed_ratios(maps).to_dict("records"):
            device = roofline.device_of(row["device"])
            if device is None:
                continue
            recipe = row["recipe"].removesuffix("_fast")
            width, tokens = int(row["model"].removeprefix("w")), row["seq_len"] * row["micro_batch"]
            busy = _busy_share([speed for speed in maps if _occasion(speed) in row["timed_on"]], row)
            measured[device.name, recipe, tokens, width] = row["ratio"], row["interval_high"], busy
    keys = zip(table["device"], table["recipe"], table["tokens"], table["width"], strict=True)
    unknown = (float("nan"),) * 3
    found = [measured.get(key, unknown) for key in keys]
    return table.join(pd.DataFrame(found, columns=["measured", "high", "busy"], index=table.index))


def _busy_share(speeds: Sequence[SpeedRun], row: Mapping[Hashable, Any]) -> float:
    """Share of a step that the GPU works, BF16's or a row's recipe's: the smaller one, of the last with profiles."""
    for speed in reversed(speeds):
        contestants = speed.cases.get(row["case"], {}).get("contestants", {})
        both = [contestants.get(recipe, {}) for recipe in ("bf16", row["recipe"])]
        if all(one.get("profile") for one in both):
            return min(sum(one["profile"]["ms_by_category"].values()) / one["step_ms_median"] for one in both)
    return float("nan")
