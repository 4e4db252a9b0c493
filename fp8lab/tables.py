"""Records in, table out: pandas frames, ready to print or to draw.

Frames that a reader sees have headings with units and values already rounded to what the data can
carry; frames that figures draw have plain column names and raw numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fp8lab import diagnosis, estimate, flops, roofline, scaling
from fp8lab.comparison import EQUIVALENCE_MARGIN, LEVEL, TARGET_HALF_WIDTH, Deviation, Gap
from fp8lab.config import MODELS, RECIPES, ModelConfig, Plan, parameter_count
from fp8lab.errors import UserError
from fp8lab.records import BenchmarkRecord, DataRecord, TestRecord
from fp8lab.results import Run, RunSet, SpeedRun, best_known_gaps, seed_deviation, unique
from fp8lab.scaling import HeldOut, JointLaw
from fp8lab.units import number, p_value, ranges, scientific, signed, signed_percent
from fp8lab.variance import Study

RANDOM_GUESS = {
    "hellaswag": 0.25,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "openbookqa": 0.25,
    "sciq": 0.25,
    "mmlu": 0.25,
    "boolq": 0.5,
    "piqa": 0.5,
    "winogrande": 0.5,
}
"""Accuracy of guessing among a task's choices (a few ARC items have three or five)."""

PUBLISHED_COLUMNS = (
    "model",
    "params",
    "train_tokens",
    "task",
    "metric",
    "value",
    "shots",
    "protocol",
    "source_title",
    "source_url",
    "notes",
)


def run_table(runs: RunSet) -> pd.DataFrame:
    """One row a run: what it was and how it ended."""
    rows = [
        {
            "model": run.size,
            "recipe": run.recipe,
            "seed": run.record.seed,
            "tokens": number(run.record.tokens),
            "tokens / N": f"{run.record.tokens / run.parameters:.1f}",
            "compute (FLOPs)": scientific(run.record.flops.total),
            "validation loss (nats/token)": f"{run.validation_loss:.4f}",
            "bits/byte": f"{run.bits_per_byte:.4f}",
        }
        for run in runs.runs
    ]
    return pd.DataFrame(rows)


def final_losses(runs: RunSet) -> pd.DataFrame:
    """Every final validation loss, those of decay branches included, as scaling laws are fitted to them.

    Returns:
        Columns: size, recipe, seed, run (the stable run; its branches share it), is_branch, budget (tokens a
        parameter), parameters (N, total), non_embedding, matmul, tokens, loss (nats a token), bits_per_byte, and
        training FLOPs by convention: flops_6n, flops_matmul_attention, flops_causal.
    """
    rows = []
    for run in (*runs.runs, *runs.branches):
        record = run.record
        rows.append(
            {
                "size": run.size,
                "recipe": run.recipe,
                "seed": record.seed,
                "run": record.parent.run if record.parent else record.run,
                "is_branch": record.parent is not None,
                "budget": round(record.tokens / run.parameters, 1),
                "parameters": run.parameters,
                "non_embedding": record.parameters.non_embedding,
                "matmul": record.parameters.matmul,
                "tokens": record.tokens,
                "loss": run.validation_loss,
                "bits_per_byte": run.bits_per_byte,
                "flops_6n": record.flops.per_token_6n * record.tokens,
                "flops_matmul_attention": record.flops.per_token_matmul_attention * record.tokens,
                "flops_causal": record.flops.per_token_matmul_attention_causal * record.tokens,
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["parameters", "recipe", "seed", "tokens"], key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Recipes as `config.RECIPES` has them; anything else as it is."""
    return column.map(RECIPES.index) if column.name == "recipe" else column


def budget_table(points: pd.DataFrame) -> pd.DataFrame:
    """`final_losses` for reading: a row a size and recipe, a column a budget; means over seeds."""
    losses = points.pivot_table(index=["parameters", "size", "recipe"], columns="budget", values="loss", sort=False)
    budgets = sorted(losses.columns)
    table = losses.reset_index()
    columns = {"model": table["size"], "N": table["parameters"].map(number), "recipe": table["recipe"]}
    return pd.DataFrame(
        columns | {f"{budget:g} tokens/N": table[budget].map("{:.4f}".format, na_action="ignore") for budget in budgets}
    )


EXTRAPOLATED = ("125M", "250M", "350M", "1.5B")
"""Sizes of the source article, which our runs do not reach at full length."""


def extrapolated(points: pd.DataFrame, law: JointLaw, draws: Sequence[JointLaw], budget: float) -> pd.DataFrame:
    """What a law says of sizes beyond those it was fitted to, in BF16: extrapolated, never measured.

    Args:
        points: what the law was fitted to, as `final_losses` gives them.
        draws: refits, for the intervals.
        budget: tokens a parameter.

    Returns:
        A row a model, the largest measured one first. Columns: size, parameters, non_embedding, tokens, factor (N over
        the largest measured N), loss, low, high (95%, nats a token), drop, drop_low, drop_high (loss at the largest
        measured size minus loss here) and for each published law its own drop, under its name.
    """
    largest = points.iloc[int(points["parameters"].to_numpy().argmax())]
    counts = {name: flops.parameters(MODELS[name]) for name in EXTRAPOLATED}
    rows = [(str(largest["size"]), float(largest["parameters"]), float(largest["non_embedding"]))]
    rows += [(name, float(count.total), float(count.non_embedding)) for name, count in counts.items()]
    table = pd.DataFrame(rows, columns=["size", "parameters", "non_embedding"])
    table = table[table["parameters"] >= table["parameters"].iloc[0]].reset_index(drop=True)
    n = table["parameters"].to_numpy()
    table["tokens"], table["factor"] = budget * n, n / n[0]
    table["loss"] = law(n, budget * n)
    drawn = np.array([other(n, budget * n) for other in draws])
    table["low"], table["high"] = np.quantile(drawn, (0.025, 0.975), axis=0)
    table["drop"] = table["loss"].iloc[0] - table["loss"]
    table["drop_low"], table["drop_high"] = np.quantile(drawn[:, :1] - drawn, (0.025, 0.975), axis=0)
    for name in scaling.PUBLISHED:
        loss = scaling.published_loss(name, n, table["non_embedding"], table["tokens"])
        table[name] = loss[0] - loss
    return table


def extrapolation_table(table: pd.DataFrame) -> pd.DataFrame:
    """`extrapolated` for reading, without its measured row."""
    beyond = table.iloc[1:]
    columns = {
        "model": beyond["size"],
        "N over the largest measured": beyond["factor"].map("{:.1f}×".format),
        "tokens": beyond["tokens"].map(number),
        "loss, extrapolated (nats/token)": beyond["loss"].map("{:.3f}".format),
        "95% interval": [_range(low, high, 2) for low, high in zip(beyond["low"], beyond["high"], strict=True)],
        "its drop from the largest measured": beyond["drop"].map("{:.3f}".format),
        "95% interval of the drop": [
            _range(low, high, 2) for low, high in zip(beyond["drop_low"], beyond["drop_high"], strict=True)
        ],
    }
    return pd.DataFrame(columns | {f"drop by {name}": beyond[name].map("{:.3f}".format) for name in scaling.PUBLISHED})


def _range(low: float, high: float, digits: int) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "−")


def law_table(fits: Mapping[str, tuple[JointLaw, Sequence[JointLaw]]]) -> pd.DataFrame:
    """Constants of fitted laws with 95% intervals.

    Args:
        fits: name -> the law and its refits to drawn runs.
    """
    constants: dict[str, tuple[Callable[[JointLaw], float], int]] = {
        "E (nats/token)": (lambda law: law.bf16.E, 2),
        "α": (lambda law: law.bf16.alpha, 3),
        "β": (lambda law: law.bf16.beta, 3),
        "a of N ∝ Cᵃ": (lambda law: law.bf16.size_exponent, 2),
    }
    rows = []
    for name, (law, draws) in fits.items():
        row: dict[str, object] = {"fit": name}
        for constant, (value, digits) in constants.items():
            row[constant] = _with_interval(value, law, draws, digits)
        row |= {"A": scientific(law.bf16.A), "B": scientific(law.bf16.B)}
        rows.append(row)
    return pd.DataFrame(rows)


def _with_interval(
    value: Callable[[JointLaw], float], law: JointLaw, draws: Sequence[JointLaw], digits: int = 3
) -> str:
    low, high = scaling.interval([value(drawn) for drawn in draws])
    return f"{value(law):.{digits}f} ({_range(low, high, digits)})"


def multiplier_table(
    tokens: tuple[JointLaw, Sequence[JointLaw]], parameters: tuple[JointLaw, Sequence[JointLaw]], n: float, d: float
) -> pd.DataFrame:
    """What each FP8 recipe makes of its budget, and what that is in loss at one size.

    Args:
        tokens, parameters: the joint law on each budget, and its refits.
        n, d: parameters and tokens at which the loss gap is given.
    """

    def row(recipe: str) -> dict[str, object]:
        def share(law: JointLaw) -> float:
            return law.multipliers[recipe]

        def gap(law: JointLaw) -> float:
            return float(law(n, d, recipe) - law(n, d))

        return {
            "recipe": recipe,
            "share of its tokens": _with_interval(share, *tokens),
            "share of its parameters": _with_interval(share, *parameters),
            "loss gap (nats/token)": _with_interval(gap, *tokens, digits=4),
        }

    return pd.DataFrame([row(recipe) for recipe in tokens[0].multipliers])


def gap_by_budget(points: pd.DataFrame, law: JointLaw, scatter: Deviation | None) -> pd.DataFrame:
    """Measured loss of each FP8 recipe minus BF16's at the same sizes, by budget, and the joint law's.

    Args:
        points: what the law was fitted to, as `final_losses` gives them.
        scatter: of seeds (nats a token), for the 95% intervals.
    """
    points = points.assign(law=law.of(points))
    measured, fitted = (
        points.pivot_table(index=["budget", "size"], columns="recipe", values=column) for column in ("loss", "law")
    )
    rows = []
    for recipe in law.multipliers:
        row: dict[str, object] = {"recipe": recipe}
        gaps = (measured[recipe] - measured["bf16"]).dropna()
        for budget in gaps.index.unique("budget"):
            at_budget = gaps[budget].to_numpy()
            interval = f" ± {scatter.reach(len(at_budget)):.4f}" if scatter else ""
            row[f"{budget:g} tokens/N"] = signed(at_budget.mean()) + interval
            by_law = (fitted[recipe] - fitted["bf16"])[budget].dropna()
            row[f"{budget:g}, by the law"] = signed(by_law.to_numpy().mean())
        rows.append(row)
    return pd.DataFrame(rows)


def held_out_table(held_out: pd.DataFrame, predictions: Sequence[HeldOut], unit: str, digits: int = 3) -> pd.DataFrame:
    """Predicted and measured losses of runs that a law was not fitted to.

    Args:
        held_out: their rows of `final_losses`.
        predictions: one a row.
        unit: of the losses.
    """
    rows = []
    for (_, run), prediction in zip(held_out.iterrows(), predictions, strict=True):
        low, high = prediction.interval or (np.nan, np.nan)
        rows.append(
            {
                "model": run["size"],
                "recipe": run["recipe"],
                "tokens / N": f"{run['budget']:g}",
                f"predicted ({unit})": f"{prediction.predicted:.{digits}f}",
                f"measured ({unit})": f"{prediction.measured:.{digits}f}",
                "error": signed_percent(prediction.error, 2),
                "95% interval": f"{signed_percent(low, 2)} to {signed_percent(high, 2)}",
            }
        )
    return pd.DataFrame(rows)


PARAMETER_CONVENTIONS = {
    "total, the tied embedding once (ours)": "parameters",
    "without the embedding": "non_embedding",
}
FLOP_CONVENTIONS = {
    "6·N_matmul + 6·L·d·T, causal (ours)": "flops_causal",
    "6·N_matmul + 12·L·d·T": "flops_matmul_attention",
    "6·N": "flops_6n",
    "6·N without the embedding": "flops_6n_non_embedding",
}


def exponents_by_parameters(points: pd.DataFrame, near: JointLaw) -> pd.DataFrame:
    """The joint law under each convention of N.

    Args:
        points: as `final_losses` gives them.
        near: the law under ours.
    """
    rows = []
    for name, column in PARAMETER_CONVENTIONS.items():
        law = scaling.fit_joint(points.assign(parameters=points[column].astype(float)), near.on)
        rows.append(
            {
                "N counts parameters": name,
                "E (nats/token)": f"{law.bf16.E:.2f}",
                "α": f"{law.bf16.alpha:.3f}",
                "β": f"{law.bf16.beta:.3f}",
                "a of N ∝ Cᵃ": f"{law.bf16.size_exponent:.2f}",
            }
            | {f"{recipe}, share of its {near.on}": f"{share:.3f}" for recipe, share in law.multipliers.items()}
        )
    return pd.DataFrame(rows)


def exponents_by_flops(points: pd.DataFrame) -> pd.DataFrame:
    """The power law of the efficient frontier, L = (C_c / C) ** γ, under each convention of compute.

    Args:
        points: final losses of one precision.
    """
    points = points.assign(flops_6n_non_embedding=6.0 * points["non_embedding"] * points["tokens"])
    rows = []
    for name, column in FLOP_CONVENTIONS.items():
        efficient = points.iloc[scaling.frontier(points[column], points["loss"])]
        law = scaling.fit_power_law(efficient[column], efficient["loss"])
        rows.append(
            {
                "FLOPs a token": name,
                "compute of the largest run": scientific(points[column].max()),
                "over ours": f"{points[column].max() / points['flops_causal'].max():.3f}",
                "γ": f"{law.exponent:.4f}",
                "runs on the frontier": len(efficient),
            }
        )
    return pd.DataFrame(rows)


def parameter_conventions(runs: RunSet) -> pd.DataFrame:
    """Parameters and training FLOPs a token of each model, by convention, and the share of GEMM FLOPs in FP8."""
    rows = []
    for size in runs.sizes:
        record = runs.where(size=size)[0].record
        rows.append(
            {
                "model": size,
                "layers × width": f"{record.model.n_layers} × {record.model.d_model}",
                "N, total": number(record.parameters.total),
                "non-embedding": number(record.parameters.non_embedding),
                "6·N": scientific(record.flops.per_token_6n),
                "6·N_matmul + 12·L·d·T": scientific(record.flops.per_token_matmul_attention),
                "6·N_matmul + 6·L·d·T": scientific(record.flops.per_token_matmul_attention_causal),
                "linear-layer FLOPs in the blocks": f"{_block_share(runs.where(size=size)[0]):.0%}",
            }
        )
    return pd.DataFrame(rows)


def _block_share(run: Run) -> float:
    """Share of the linear layers' FLOPs outside the head: what FP8 can reach when the head stays in BF16."""
    head = run.record.model.vocab_size * run.record.model.d_model
    return 1 - head / run.record.parameters.matmul


def conversion(run: Run) -> pd.DataFrame:
    """What the precision swap did, one row a kind of layer instead of one a block."""
    table = pd.DataFrame(run.record.conversion, columns=["name", "shape", "precision", "reason"])
    table["layer"] = table["name"].str.replace(r"^blocks\.\d+\.", "", regex=True)
    grouped = table.groupby(["layer", "shape", "precision", "reason"], sort=False).size().rename("count").reset_index()
    return grouped.rename(columns={"shape": "shape (out × in)", "count": "layers of this kind"})


def loss_gaps(*sets: RunSet) -> pd.DataFrame:
    """Validation loss of each FP8 recipe minus BF16's, and what so many seeds let one say of it.

    Args:
        sets: plans; of each size and recipe the one with the most seeds counts.
    """
    return pd.DataFrame(
        [
            {"model": size, "recipe": recipe} | _gap_columns(gap, seed_deviation(sets, below=_parameters(size, sets)))
            for (size, recipe), gap in best_known_gaps(*sets).items()
        ]
    )


def _parameters(size: str, sets: Sequence[RunSet]) -> int:
    return next(run.parameters for runs in sets for run in runs.where(size=size))


def _gap_columns(gap: Gap, assumed: Deviation | None = None) -> dict[str, object]:
    """A gap as a reader sees it.

    Args:
        assumed: scatter of smaller models, for a gap that has no interval of its own.
    """
    interval, how, equivalent = "–", "–", gap.equivalence_p()
    if gap.interval is not None:
        interval = f"{signed(gap.interval[0])} to {signed(gap.interval[1])}"
        how = "pairs" if gap.paired else "two groups"
    elif assumed is not None:
        low, high = gap.assumed_interval(assumed)
        interval, how = f"{signed(low)} to {signed(high)}", "assumed"
    return {
        "seeds": gap.seeds,
        "BF16 loss (nats/token)": f"{gap.baseline:.4f}",
        "FP8 − BF16 (nats/token)": signed(gap.mean),
        "relative": signed_percent(gap.mean / gap.baseline, 2),
        "95% interval": interval,
        "from": how,
        "correlation of seeds": "–" if gap.correlation is None else signed(gap.correlation.value, 2),
        f"p, beyond ±{EQUIVALENCE_MARGIN:g}": "–" if equivalent is None else p_value(equivalent),
        "so": verdict(gap),
    }


def verdict(gap: Gap) -> str:
    """What the seeds of a gap can carry, in a few words; equivalent is within `EQUIVALENCE_MARGIN`."""
    if gap.half_width is None:
        return "cannot tell: one seed" if gap.seeds == 1 else "cannot tell"
    equivalence = gap.equivalence_p()
    equivalent = equivalence is not None and equivalence < 1 - LEVEL
    if gap.excludes_zero:
        return ("worse" if gap.mean > 0 else "better") + (", yet equivalent" if equivalent else "")
    return "equivalent" if equivalent else "cannot tell: too few seeds"


def domain_gaps(runs: RunSet, size: str) -> dict[tuple[str, str], Gap]:
    """Bits per byte of each FP8 recipe minus BF16's by (domain, recipe), on that domain's validation text."""
    domains = list(runs.where(size=size, recipe="bf16")[0].by_domain)

    def gap(domain: str, recipe: str) -> Gap:
        return runs.gap(size, recipe, lambda run: run.by_domain[domain].bits_per_byte)

    recipes = [recipe for recipe in runs.recipes if recipe != "bf16" and runs.where(size=size, recipe=recipe)]
    return {(domain, recipe): gap(domain, recipe) for domain in domains for recipe in recipes}


def variance_designs(study: Study) -> pd.DataFrame:
    """What each design of the variance study costs for an interval of plus or minus `TARGET_HALF_WIDTH`."""
    rows = []
    for cell in study.cells:
        pairs, minutes = cell.comparison.pairs_range(), cell.minutes_needed()
        cost = study.loss_cost(cell)
        rows.append(
            {
                "design": cell.design,
                "weights": cell.weights,
                "seeds": cell.seeds,
                "BF16 loss (nats/token)": f"{np.mean(list(cell.losses('bf16').values())):.4f}",
                "against base": "–" if cell is study.base else _with_reach(cost),
                "sd (95% interval)": _deviation(cell.scatter),
                "sd of differences": "–" if cell.differences is None else _deviation(cell.differences),
                "from": "pairs" if cell.comparison.paired else "two groups",
                f"pairs for ±{TARGET_HALF_WIDTH:g}": f"{cell.comparison.pairs_needed()} ({pairs[0]}–{pairs[1]})",
                "GPU minutes for it": f"{minutes[0]:.1f} ({minutes[1]:.1f}–{minutes[2]:.1f})",
            }
        )
    return pd.DataFrame(rows)


def _deviation(deviation: Deviation) -> str:
    low, high = deviation.interval
    return f"{deviation.value:.4f} ({low:.4f}–{high:.4f})"


def _with_reach(gap: Gap) -> str:
    return signed(gap.mean) + (f" ± {gap.half_width:.4f}" if gap.half_width is not None else "")


def variance_gaps(study: Study) -> pd.DataFrame:
    """FP8 minus BF16 in each cell of the variance study."""
    return pd.DataFrame(
        [{"design": cell.design, "weights": cell.weights} | _gap_columns(cell.gap) for cell in study.cells]
    )


def spikes(runs: RunSet) -> pd.DataFrame:
    """Signs of instability of each run."""
    rows = [
        {
            "model": run.size,
            "recipe": run.recipe,
            "seed": run.record.seed,
            "spike score": f"{run.record.stability.spike_score:.2%}" if run.record.stability else "–",
            "skipped steps": run.record.stability.skipped_steps if run.record.stability else "–",
            "largest gradient norm": f"{run.metrics['grad_norm'].max():.2f}",
            "status": run.record.status,
        }
        for run in (*runs.runs, *(run for run in runs.unfinished if run.record.status == "diverged"))
    ]
    return pd.DataFrame(rows)


def scores(runs: RunSet) -> pd.DataFrame:
    """Every score of every scored run, as lm-eval gave it; of a group (MMLU) the group's own, not its members'.

    Columns: size, recipe, seed, task, metric, value, stderr (NaN where lm-eval gives none), n (items),
    random_guess (accuracy of guessing; NaN where it has no meaning or is unknown).
    """
    rows = [row for run in runs.runs if run.evaluation is not None for row in _run_scores(run)]
    columns = ["size", "recipe", "seed", "task", "metric", "value", "stderr", "n", "random_guess"]
    return pd.DataFrame(rows, columns=columns)


def _run_scores(run: Run) -> list[dict[str, object]]:
    evaluation = run.evaluation or {}
    guesses = RANDOM_GUESS | evaluation.get("random_guess", {})
    members = {name for names in evaluation.get("group_subtasks", {}).values() for name in names}
    rows: list[dict[str, object]] = []
    for task, values in evaluation["results"].items():
        if task in members:
            continue
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if filter_name != "none" or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,none")
            rows.append(
                {
                    "size": run.size,
                    "recipe": run.recipe,
                    "seed": run.record.seed,
                    # The alias says where another split than the task's own was scored.
                    "task": values.get("alias", task),
                    "metric": metric,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else np.nan,
                    "n": evaluation.get("n-samples", {}).get(task, {}).get("effective"),
                    "random_guess": guesses.get(task, np.nan) if metric in ("acc", "acc_norm") else np.nan,
                }
            )
    return rows


def score_table(runs: RunSet) -> pd.DataFrame:
    """Scores for reading: a row a run, a column a task and metric; items and random guess in the first two rows."""
    table = scores(runs)
    header: list[dict[str, object]] = [{"model": "items", "recipe": ""}, {"model": "random guess", "recipe": ""}]
    rows: dict[tuple[str, str, int], dict[str, object]] = {}
    for _, score in table.iterrows():
        column = f"{score['task']} ({score['metric']})"
        header[0][column] = "–" if pd.isna(score["n"]) else f"{int(score['n']):,}"
        header[1][column] = "–" if pd.isna(score["random_guess"]) else f"{score['random_guess']:.0%}"
        row = rows.setdefault(
            (score["size"], score["recipe"], score["seed"]), {"model": score["size"], "recipe": score["recipe"]}
        )
        row[column] = _score(score["value"], score["stderr"], score["metric"])
    return pd.DataFrame([*header, *rows.values()]) if rows else pd.DataFrame()


def _score(value: float, stderr: float, metric: str) -> str:
    if metric in ("acc", "acc_norm"):
        return f"{value:.1%}" if stderr != stderr else f"{value:.1%} ± {stderr:.1%}"
    return f"{value:.4g}"


def answer_bits(runs: RunSet) -> pd.DataFrame:
    """Bits a byte of the correct answers' text: a row a scored run, a column a task with answers to choose from."""
    rows = []
    for run in runs.runs:
        evaluation = run.evaluation or {}
        members = {name for names in evaluation.get("group_subtasks", {}).values() for name in names}
        bits = {
            evaluation["results"][task].get("alias", task): f"{values['bits_per_byte']:.3f} ± "
            f"{values['bits_per_byte_stderr']:.3f}"
            for task, values in evaluation.get("answers", {}).items()
            if task not in members
        }
        if bits:
            rows.append({"model": run.size, "recipe": run.recipe} | bits)
    return pd.DataFrame(rows)


def published_scores() -> pd.DataFrame:
    """Scores that others published for comparable models, a source for each (fp8lab/published_scores.csv).

    Raises:
        UserError: the file lacks a column.
    """
    with resources.as_file(resources.files("fp8lab") / "published_scores.csv") as path:
        if not path.exists():
            return pd.DataFrame(columns=list(PUBLISHED_COLUMNS))
        table = pd.read_csv(path)
        missing = [column for column in PUBLISHED_COLUMNS if column not in table.columns]
        if missing:
            raise UserError(f"{path}: missing column {', '.join(missing)}")
    return table


def published_comparison(tasks: Sequence[str], models: Sequence[str], runs: RunSet | None = None) -> pd.DataFrame:
    """Accuracy (%) on `tasks`: guessing, our own runs where they were scored on all items, and published `models`.

    A column is zero-shot lm-eval in the metric of its heading. Where a model has no such figure, the nearest
    there is stands in its place, with a mark of `PUBLISHED_MARKS`.
    """
    guess: dict[str, object] = {"model": "random guess", "parameters": "", "training tokens": ""}
    rows = [guess | {_heading(task): f"{RANDOM_GUESS[task]:.0%}".rstrip("%") for task in tasks}]
    rows += [own for run in (runs.runs if runs else ()) if (own := _own_scores(run, tasks)) is not None]
    published = published_scores()
    for model in models:
        of_model = published[published["model"] == model]
        if of_model.empty:
            continue
        row: dict[str, object] = {
            "model": model,
            "parameters": of_model["params"].iloc[0],
            "training tokens": next(iter(of_model["train_tokens"].dropna()), "–"),
        }
        rows.append(row | {_heading(task): _published_score(of_model, task) for task in tasks})
    return pd.DataFrame(rows) if len(rows) > 1 else pd.DataFrame()


def published_accuracy(model: str, task: str, protocol: str, shots: int = 0, metric: str = "acc") -> float:
    """One published accuracy, in percent.

    Raises:
        KeyError: there is no such figure.
    """
    table = published_scores()
    wanted = {"model": model, "task": task, "protocol": protocol, "shots": str(shots), "metric": metric}
    for column, value in wanted.items():
        table = table[table[column].astype(str) == value]
    if table.empty:
        raise KeyError(f"published_scores.csv: no {metric} of {model} on {task}, {shots}-shot by {protocol}")
    return float(table["value"].iloc[0])


PUBLISHED_MARKS = {
    "ᵃ": "acc, where the column is acc_norm, or the reverse",
    "ᵇ": "another harness than lm-eval, or one that the source does not state",
    "ᶜ": "few-shot",
    "ᵈ": "another split than the task's own",
}


def _published_score(of_model: pd.DataFrame, task: str) -> str:
    """The model's figure nearest to zero-shot lm-eval in the task's usual metric, marked for how it differs."""
    candidates = []
    for _, row in of_model[(of_model["task"] == task) & of_model["metric"].isin(("acc", "acc_norm"))].iterrows():
        differs = {
            "ᵃ": row["protocol"] == "lm-eval" and row["metric"] != usual_metric(task),
            "ᵇ": row["protocol"] != "lm-eval",
            "ᶜ": str(row["shots"]) != "0",
        }
        candidates.append(("".join(mark for mark, is_so in differs.items() if is_so), float(row["value"])))
    if not candidates:
        return "–"
    marks, value = min(candidates, key=lambda candidate: (len(candidate[0]), candidate[0]))
    return f"{value:.1f}{marks}"


def _own_scores(run: Run, tasks: Sequence[str]) -> dict[str, object] | None:
    """A run's row of `published_comparison`; None where it was not scored on all items of any of the tasks."""
    evaluation = run.evaluation or {}
    results = evaluation.get("results", {})
    if evaluation.get("config", {}).get("limit") is not None or not any(task in results for task in tasks):
        return None
    row: dict[str, object] = {
        "model": f"this project, {run.size} {run.recipe}",
        "parameters": number(run.parameters),
        "training tokens": number(run.record.tokens),
    }
    for task in tasks:
        metric, values = usual_metric(task), results.get(task, {})
        value, stderr = values.get(f"{metric},none"), values.get(f"{metric}_stderr,none")
        if value is None:
            row[_heading(task)] = "–"
            continue
        error = f" ± {100 * stderr:.1f}" if isinstance(stderr, int | float) else ""
        other_split = "note" in evaluation.get("data", {}).get("tasks", {}).get(task, {})
        row[_heading(task)] = f"{100 * value:.1f}{error}{'ᵈ' if other_split else ''}"
    return row


def _heading(task: str) -> str:
    return f"{task} ({usual_metric(task)})"


def usual_metric(task: str) -> str:
    """The accuracy that a task is usually quoted in."""
    return "acc_norm" if task.partition(" (")[0] in ("hellaswag", "arc_challenge", "openbookqa", "piqa") else "acc"


def health(runs: Sequence[Run]) -> pd.DataFrame:
    """What rounding does to each kind of Linear in FP8 `runs`: medians of the second half, the worst of all blocks."""
    rows = []
    for run in runs:
        table = diagnosis.settled(run)
        grown = diagnosis.amax_growth(run)
        for (kind, tensor), group in table.groupby(["kind", "tensor"], observed=True, sort=False):
            growth = grown[(grown["kind"] == kind) & (grown["tensor"] == tensor)]["growth"].max()
            rows.append(
                {
                    "recipe": run.recipe,
                    "Linear": str(kind).rpartition(".")[2],
                    "operand": tensor,
                    "underflow": _small_share(group["underflow_fraction"].max()),
                    "saturation": _small_share(group["saturation_fraction"].max()),
                    "SQNR (dB)": f"{group['sqnr_db'].min():.1f}",
                    "largest amax, × first": f"{growth:.2f}",
                }
            )
    return pd.DataFrame(rows)


def rounding_losses(runs: Sequence[Run]) -> pd.DataFrame:
    """The operands of FP8 `runs` that pass a limit of `fp8lab.diagnosis`, a row a kind of Linear; maybe empty."""
    rows = []
    for run in runs:
        found = diagnosis.violations(run)
        for (kind, tensor, reason), group in found.groupby(["kind", "tensor", "reason"], observed=True, sort=False):
            values = group[diagnosis.COLUMN_OF[str(reason)]]
            worst = f"{values.min():.1f} dB" if reason == "SQNR" else _small_share(values.max())
            rows.append(
                {
                    "recipe": run.recipe,
                    "Linear": str(kind).rpartition(".")[2],
                    "operand": tensor,
                    "blocks": ranges(group["block"]),
                    "passes the limit of": reason,
                    "worst": worst,
                }
            )
    return pd.DataFrame(rows)


def _small_share(value: float) -> str:
    """0, or a percentage with two digits that count."""
    return "0" if value == 0 else f"{100 * value:.2g}%"


def data_composition(record: DataRecord) -> pd.DataFrame:
    """A row a domain of a data set.

    Args:
        record: its `results` are the data set's manifest, its `config` the mixture.

    Returns:
        Columns: domain, weight (share of each batch), documents, train_tokens, validation_tokens, removed
        (documents), contaminated (documents that share text with an evaluation item; among the removed).

    Raises:
        UserError: a domain or field is missing.
    """
    try:
        rows = [
            {
                "domain": domain,
                "weight": float(record.config["domains"][domain]["weight"]),
                "documents": values["train"]["documents"],
                "train_tokens": values["train"]["tokens"],
                "validation_tokens": values["validation"]["tokens"],
                "removed": sum(values["removed"].values()),
                "contaminated": values["removed"]["contaminated"],
            }
            for domain, values in record.results["domains"].items()
        ]
    except KeyError as error:
        raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows)


def data_table(record: DataRecord) -> pd.DataFrame:
    """`data_composition` for reading."""
    table = data_composition(record)
    return pd.DataFrame(
        {
            "domain": table["domain"],
            "share of each batch": table["weight"].map("{:.0%}".format),
            "documents": table["documents"].map("{:,}".format),
            "training tokens": table["train_tokens"].map(number),
            "validation tokens": table["validation_tokens"].map(number),
            "documents removed": table["removed"].map("{:,}".format),
        }
    )


def data_benchmarks(benchmarks: Sequence[BenchmarkRecord]) -> pd.DataFrame:
    """What the data path must keep up with, and what was measured (records of `fp8lab.data.benchmark`).

    Raises:
        UserError: a field is missing.
    """
    rows = []
    for record in benchmarks:
        try:
            rows += _BENCHMARK_ROWS[record.run](record.results) if record.run in _BENCHMARK_ROWS else []
        except KeyError as error:
            raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows, columns=["what", "median", "range", "goal"])


def _loader_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    speed = results["tokens_per_second"]
    what = f"loader, batches of {results['batch_tokens']:,} tokens (tokens/s)"
    return [(what, number(speed["median"]), f"{number(speed['min'])} to {number(speed['max'])}", "≥ 10M")]


def _tokenise_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def row(what: str, key: str, digits: int, goal: str) -> tuple[str, ...]:
        value = results[key]
        spread = f"{value['min']:.{digits}f} to {value['max']:.{digits}f}"
        return what, f"{value['median']:.{digits}f}", spread, goal

    return [
        row("tokenising in the build, files to shards (MB/s)", "build_megabytes_per_second", 1, "–"),
        row("tiktoken's batch encoding, from memory (MB/s)", "tiktoken_megabytes_per_second", 1, "–"),
        row("build / tiktoken, round by round", "ratio", 2, "≥ 0.80"),
    ]


def _memory_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    what = f"peak memory of a process, documents of {results['document_bytes'] / 1e6:.0f} MB (GiB)"
    return [(what, f"{results['peak_memory_bytes'] / 2**30:.2f}", "–", "< 2")]


_BENCHMARK_ROWS = {"data-loader": _loader_rows, "data-memory": _memory_rows, "data-tokenise": _tokenise_rows}


FAULT_TOPICS = ("kill", "signal", "damage", "disk", "non-finite", "memory", "lock", "strangers", "writing")
"""What the fault tests report on, in the order of the article."""


def faults(record: TestRecord) -> pd.DataFrame:
    """A row a fault: what was done, what the run did, and in which precisions the tests saw it.

    Raises:
        UserError: a report of an unknown topic, or with a field missing.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for report in _fault_reports(record):
        recipes = rows.setdefault((report["fault"], report["outcome"]), [])
        if "recipe" in report["measured"]:
            recipes.append(report["measured"]["recipe"])
    return pd.DataFrame(
        [
            {"fault": fault, "what the run does": outcome, "seen in": ", ".join(unique(recipes)) or "–"}
            for (fault, outcome), recipes in rows.items()
        ],
        columns=["fault", "what the run does", "seen in"],
    )


def fault_measurements(record: TestRecord) -> pd.DataFrame:
    """A row a report: the test, and what it measured in its own words.

    Raises:
        UserError: as `faults`.
    """
    rows = []
    for report in _fault_reports(record):
        measured = [
            f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in report["measured"].items()
        ]
        test = report["test"].rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        rows.append({"test": test, "measured": "; ".join(measured)})
    return pd.DataFrame(rows, columns=["test", "measured"])


def _fault_reports(record: TestRecord) -> list[Mapping[str, Any]]:
    """The reports, by topic."""
    where = f"{record.plan}/{record.run}/record.json"
    reports = record.results.get("faults", [])
    for report in reports:
        missing = [key for key in ("topic", "fault", "outcome", "measured", "test", "passed") if key not in report]
        if missing:
            raise UserError(f"{where}: faults: {missing[0]}: missing")
        if report["topic"] not in FAULT_TOPICS:
            raise UserError(f"{where}: faults: unknown topic {report['topic']!r}; known: {', '.join(FAULT_TOPICS)}")
    return sorted(reports, key=lambda report: FAULT_TOPICS.index(report["topic"]))


def trainer_benchmarks(benchmarks: Sequence[BenchmarkRecord]) -> pd.DataFrame:
    """What the trainer adds to the bare step, and what checkpoints cost (records of `fp8lab.benchmark`).

    Raises:
        UserError: a field is missing.
    """
    return _benchmark_rows(
        benchmarks,
        {"trainer-overhead": _overhead_rows, "trainer-checkpoint": _checkpoint_rows},
        ["model", "recipe", "what", "median", "range", "goal"],
    )


def resumed_runs(benchmarks: Sequence[BenchmarkRecord]) -> pd.DataFrame:
    """Two runs of one configuration compared: one killed and resumed, or (the control) neither.

    Raises:
        UserError: a field is missing.
    """
    columns = ["model", "recipe", "compared with a whole run", "weights equal", "largest difference of a weight"]
    columns += ["first step whose loss differs", "largest difference of a loss (nats)", "of the validation loss (nats)"]
    return _benchmark_rows(benchmarks, {"trainer-resume": _resume_rows}, columns)


def _benchmark_rows(
    benchmarks: Sequence[BenchmarkRecord],
    kinds: Mapping[str, Callable[[Mapping[str, Any]], list[tuple[str, ...]]]],
    columns: list[str],
) -> pd.DataFrame:
    rows: list[tuple[str, ...]] = []
    for kind, make_rows in kinds.items():
        for record in benchmarks:
            if not record.run.startswith(f"{kind}-"):
                continue
            try:
                identity = (record.results["model"], record.results["recipe"])
                rows += [(*identity, *row) for row in make_rows(record.results)]
            except KeyError as error:
                raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows, columns=columns)


def _summary_row(what: str, measured: Mapping[str, Any], form: str, goal: str = "–") -> tuple[str, ...]:
    def shown(value: float) -> str:
        return form.format(value).replace("-", "−")

    return what, shown(measured["median"]), f"{shown(measured['min'])} to {shown(measured['max'])}", goal


def _overhead_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        _summary_row("bare step (ms)", _scaled(results["bare_step_seconds"], 1e3), "{:.2f}"),
        _summary_row("data and logging (% of it)", _scaled(results["loop_share"], 100), "{:+.2f}"),
    ]
    for what, goal in (("health", "< 1"), ("validation", "–")):
        if results[f"{what}_share"] is not None:
            rows.append(_summary_row(f"{what} (% of it)", _scaled(results[f"{what}_share"], 100), "{:+.2f}", goal))
    return [*rows, _summary_row("all together (% of it)", _scaled(results["overhead"], 100), "{:+.2f}", "< 2")]


def _checkpoint_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        ("checkpoint (GB)", f"{results['checkpoint_bytes'] / 1e9:.2f}", "–", "–"),
        _summary_row("written in the background in (s)", results["write_seconds"], "{:.2f}"),
        _summary_row("the loop stands for (s)", results["stall_seconds"], "{:.3f}"),
        _summary_row("training loses (s)", results["lost_seconds"], "{:.3f}"),
        _summary_row(f"of {results['save_every']} steps (%)", _scaled(results["cost"], 100), "{:.2f}", "< 2"),
    ]


def _scaled(measured: Mapping[str, Any], factor: float) -> dict[str, float]:
    return {key: factor * measured[key] for key in ("median", "min", "max")}


def _resume_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for what, name in (("control", "a second whole run"), ("resumed", "killed and resumed")):
        compared = results[what]
        first = compared["first_different_step"]
        rows.append(
            (
                name,
                f"{compared['equal_weights_share']:.2%}" if not compared["weights_identical"] else "all, bit for bit",
                f"{compared['largest_weight_difference']:.2g}",
                "none" if first is None else str(first),
                f"{compared['largest_loss_difference']:.2g}",
                signed(compared["validation_loss_difference"]),
            )
        )
    return rows


def speed_ratios(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """Speed of each recipe against BF16 timed in the same process, each device apart.

    The interval is a 95% t-interval of the mean of the rounds' log-ratios: how far rounds scatter, which says nothing
    of another day. Of several occasions it reaches from the lowest of their intervals to the highest.

    Returns:
        A row a device, setting (model, context, micro-batch) and recipe. Columns: device, model, case, seq_len,
        micro_batch, setting, recipe, head, step_ms (median), tokens_per_second, ratio (median over rounds of BF16's
        median step over the recipe's), low, high (smallest and largest of the rounds), interval_low, interval_high,
        rounds, occasions, peak_memory_bytes.
    """
    keys = ["device", "model", "seq_len", "micro_batch"]
    steps = pd.concat([speed.steps for speed in speeds], ignore_index=True)
    medians = (
        steps.groupby([*keys, "recipe", "head", "occasion", "round"], sort=False)
        .agg(step_ms=("step_ms", "median"), tokens=("tokens", "first"), memory=("peak_memory_bytes", "max"))
        .reset_index()
    )
    is_baseline = (medians["recipe"] == "bf16") & (medians["head"] == "bf16")
    baseline_ms = medians[is_baseline].set_index([*keys, "occasion", "round"])["step_ms"].rename("bf16_ms")
    medians = medians.join(baseline_ms, on=[*keys, "occasion", "round"]).dropna(subset=["bf16_ms"])
    medians["ratio"] = medians["bf16_ms"] / medians["step_ms"]
    several = medians["device"].nunique() > 1
    rows = []
    for key, group in medians.groupby([*keys, "recipe", "head"], sort=False):
        device, model, seq_len, micro_batch, recipe, head = key
        step_ms = float(group["step_ms"].median())
        intervals = [_ratio_interval(ratios.to_numpy()) for _, ratios in group.groupby("occasion")["ratio"]]
        rows.append(
            {
                "device": device,
                "model": model,
                "case": f"{model}-T{seq_len}-B{micro_batch}",
                "seq_len": seq_len,
                "micro_batch": micro_batch,
                "setting": _setting(model, seq_len, micro_batch)
                + (f", {short_device(str(device))}" if several else ""),
                "recipe": recipe,
                "head": head,
                "step_ms": step_ms,
                "tokens_per_second": float(group["tokens"].iloc[0]) / step_ms * 1e3,
                "ratio": float(group["ratio"].median()),
                "low": float(group["ratio"].min()),
                "high": float(group["ratio"].max()),
                "interval_low": min(low for low, _ in intervals),
                "interval_high": max(high for _, high in intervals),
                "rounds": len(group),
                "occasions": group["occasion"].nunique(),
                "peak_memory_bytes": int(group["memory"].max()),
            }
        )
    table = pd.DataFrame(rows)
    order = table["setting"].map({setting: index for index, setting in enumerate(_by_speed(table))})
    return table.assign(order=order).sort_values("order", kind="stable").drop(columns="order").reset_index(drop=True)


def _ratio_interval(ratios: np.ndarray) -> tuple[float, float]:
    """95% t-interval of the mean of log-ratios, as ratios; of a single round, nothing but NaN."""
    if len(ratios) < 2:
        return float("nan"), float("nan")
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def short_device(name: str) -> str:
    """'H100' of 'NVIDIA H100 80GB HBM3'."""
    return name.removeprefix("NVIDIA ").partition(" ")[0]


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
                        "occasion": f"{speed.record.plan}/{speed.record.run}",
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
    """How far each contestant's step moved from an occasion's first round to its last.

    A GPU at its power limit lowers its clock as it warms up and as the weights grow less random, and a ratio from
    rounds that still drift is no steady state.

    Returns:
        A row an occasion, setting, recipe and head. Columns: occasion, setting, recipe, head, change (last round's
        median step over the first's, minus 1), first_clock_mhz, last_clock_mhz, power_w (medians).
    """
    steps = pd.concat([speed.steps for speed in speeds], ignore_index=True)
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
                "setting": _setting(model, seq_len, micro_batch)
                + (f", {short_device(str(device))}" if several else ""),
                "recipe": recipe,
                "head": head,
                "change": float(last["step_ms"] / first["step_ms"] - 1),
                "first_clock_mhz": float(first["sm_clock_mhz"]),
                "last_clock_mhz": float(last["sm_clock_mhz"]),
                "power_w": float(group["power_w"].median()),
            }
        )
    return pd.DataFrame(rows)


def _setting(model: object, seq_len: object, micro_batch: object) -> str:
    """How figures and tables call what a step was timed with."""
    return f"{model}, T {seq_len}, {micro_batch} sequences"


def _by_speed(table: pd.DataFrame) -> list[str]:
    """Settings from the smallest model (most tokens/s) to the largest."""
    return unique(table[table["recipe"] == "bf16"].sort_values("tokens_per_second", ascending=False)["setting"])


def speed_table(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """`speed_ratios` for reading."""
    table = speed_ratios(speeds)
    return pd.DataFrame(
        {
            "model": table["model"],
            "batch × context": [f"{b} × {t}" for b, t in zip(table["micro_batch"], table["seq_len"], strict=True)],
            "recipe": table["recipe"],
            "head": table["head"],
            "step (ms)": table["step_ms"].map("{:.1f}".format),
            "tokens/s": table["tokens_per_second"].map("{:,.0f}".format),
            "× BF16": table["ratio"].map("{:.3f}".format),
            "95% interval": [
                f"{low:.3f}–{high:.3f}" for low, high in zip(table["interval_low"], table["interval_high"], strict=True)
            ],
            "smallest to largest round": [
                f"{low:.3f}–{high:.3f}" for low, high in zip(table["low"], table["high"], strict=True)
            ],
            "rounds": table["rounds"],
            "peak memory (GiB)": (table["peak_memory_bytes"] / 2**30).map("{:.1f}".format),
        }
    )


def gemm_ceiling(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """What FP8's GEMMs alone would give, their casts free, beside the fastest recipe that was measured.

    All but the GEMMs takes BF16's time there, so a recipe that fuses other work as well can do better.
    The blocks' GEMMs only: heads in FP8 are left out on both sides. Where a case was measured on several
    occasions, the last counts.
    """
    ratios = speed_ratios(speeds)
    ratios = ratios[ratios["head"] == "bf16"]
    gemms = {
        (speed.device, case): results["gemms"]
        for speed in speeds
        for case, results in speed.cases.items()
        if "gemms" in results
    }
    rows = []
    for setting, group in ratios.groupby("setting", sort=False):
        times = gemms.get((group["device"].iloc[0], group["case"].iloc[0]))
        fp8 = group[group["recipe"] != "bf16"]
        if times is None or fp8.empty:
            continue
        bf16_ms, fp8_ms = _block_gemm_ms(times, "bf16"), _block_gemm_ms(times, "fp8")
        step_ms = group[group["recipe"] == "bf16"]["step_ms"].iloc[0]
        fastest = fp8.sort_values("ratio").iloc[-1]
        rows.append(
            {
                "model, context, micro-batch": setting,
                "BF16 step (ms)": f"{step_ms:.1f}",
                "its blocks' GEMMs (ms)": f"{bf16_ms:.1f}",
                "in FP8 (ms)": f"{fp8_ms:.1f}",
                "× BF16, casts free": f"{step_ms / (step_ms - bf16_ms + fp8_ms):.2f}",
                "× BF16, fastest measured": f"{fastest['ratio']:.2f}",
                "recipe": fastest["recipe"],
            }
        )
    return pd.DataFrame(rows)


def _block_gemm_ms(times: Mapping[str, Mapping[str, float]], precision: str) -> float:
    return sum(
        layer["count"] * sum(layer[f"{gemm}_{precision}"] for gemm in ("forward", "grad_input", "grad_weight"))
        for name, layer in times.items()
        if name != "head"
    )


def roofline_against_measurement(speeds: Sequence[SpeedRun]) -> pd.DataFrame:
    """Predicted beside measured ratios and steps, where `fp8lab.roofline` knows the device, model and recipe.

    Returns:
        A row a device, setting and recipe, heads in BF16. Columns: device, model, setting, recipe, predicted_ms,
        measured_ms, predicted_ratio, measured_ratio, interval_low, interval_high (`speed_ratios`).
    """
    ratios = speed_ratios(speeds)
    own = {
        case["model"]["name"]: ModelConfig(**case["model"])
        for speed in speeds
        for case in speed.record.config.get("cases", [])
    }
    rows = []
    for row in ratios.to_dict("records"):
        device, model = roofline.device_of(row["device"]), own.get(row["model"], MODELS.get(row["model"]))
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
        maps: occasions of the map's plan.

    Returns:
        A row a device, recipe, tokens and width. Columns: device ('H100'), recipe, tokens, width, predicted, measured
        (NaN where there is no record).
    """
    frames = [roofline.map_table(device).assign(device=device.name) for device in roofline.DEVICES]
    table = pd.concat(frames, ignore_index=True).rename(columns={"ratio": "predicted"})
    measured: dict[tuple[str, str, int, int], float] = {}
    if maps:
        for row in speed_ratios(maps).to_dict("records"):
            recipe = row["recipe"].removesuffix("_fast")
            width, tokens = int(row["model"].removeprefix("w")), row["seq_len"] * row["micro_batch"]
            measured[short_device(row["device"]), recipe, tokens, width] = row["ratio"]
    keys = zip(table["device"], table["recipe"], table["tokens"], table["width"], strict=True)
    return table.assign(measured=[measured.get(key, float("nan")) for key in keys])


def planned_runs(plan: Plan, bf16_mfu: float) -> pd.DataFrame:
    """What a plan will cost before it runs: planned, never measured.

    Args:
        bf16_mfu: assumed share of BF16's peak FLOP/s, for the hours.
    """
    rows = []
    for config in plan.runs:
        per_token = flops.flops_per_token(config.model)
        rows.append(
            {
                "run": config.run,
                "parameters": f"{parameter_count(config.model):,}",
                "tokens": f"{config.tokens:,}",
                "tokens / parameter": f"{config.tokens / parameter_count(config.model):.1f}",
                "FLOPs, 6·N": scientific(per_token.per_token_6n * config.tokens),
                "FLOPs, matmul + attention": scientific(per_token.per_token_matmul_attention * config.tokens),
                "FLOPs, causal": scientific(per_token.per_token_matmul_attention_causal * config.tokens),
                "memory (GB)": f"{estimate.memory_bytes(config) / 1e9:.0f}",
                "hours, 1 H100": _hours(estimate.hours(config, bf16_mfu, 1)),
                "hours, 8 H100s": _hours(estimate.hours(config, bf16_mfu, 8)),
            }
        )
    return pd.DataFrame(rows)


def scaling_out(runs: RunSet) -> pd.DataFrame:
    """Tokens/s of one to many GPUs; efficiency is over as many times one GPU's, same model and recipe."""
    timed = [(run, run.record.provenance.device_count, run.record.speed) for run in runs.runs]
    alone = {(run.size, run.recipe): speed for run, count, speed in timed if speed and count == 1}
    rows = []
    for run, count, speed in sorted(timed, key=lambda row: (row[0].parameters, row[0].recipe, row[1])):
        if speed is None:
            continue
        one, memory = alone.get((run.size, run.recipe)), speed.peak_memory_bytes
        efficiency = speed.tokens_per_second_median / one.tokens_per_second_median / count if one else None
        rows.append(
            {
                "model": run.size,
                "recipe": run.recipe,
                "GPUs": count,
                "sharding": "" if count == 1 else run.record.config["sharding"],
                "tokens/s": f"{speed.tokens_per_second_median:,.0f}",
                "efficiency": "" if efficiency is None else f"{efficiency:.1%}",
                "BF16-MFU": "" if speed.bf16_mfu is None else f"{speed.bf16_mfu:.1%}",
                "peak memory of a GPU (GiB)": "" if memory is None else f"{memory / 2**30:.1f}",
            }
        )
    return pd.DataFrame(rows)


def _hours(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
