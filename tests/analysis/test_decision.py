"""The first page's answer: which recipe pays from which width on, and what the page says where nothing can be said."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from fp8lab import figures, frontpage, records, tables
from fp8lab.analysis import decision, losses, roofline, slopes
from fp8lab.analysis.occasions import speed_runs
from fp8lab.analysis.rounds import side
from fp8lab.analysis.runs import plan_runs
from fp8lab.analysis.timings import with_verdicts
from fp8lab.chart import switch
from fp8lab.chart.page import chart_html
from fp8lab.claims import CLAIMED_TRAININGS
from fp8lab.config import MODELS, ModelConfig
from fp8lab.frontpage.loss import loss_costs
from fp8lab.frontpage.payoff import where
from fp8lab.units import listing
from tests.fixtures import (
    OTHER_SIZES,
    SIZES,
    Measured,
    write_demo_records,
    write_gpu_records,
    write_map_records,
    write_run,
    write_speed_records,
)


def timed(*rows: tuple[str, int, float, float], device: str = "NVIDIA H200") -> pd.DataFrame:
    """Timings of (recipe, width, ends of the ratio's interval)."""
    table = pd.DataFrame(rows, columns=["recipe", "width", "interval_low", "interval_high"])
    ends = zip(table["interval_low"], table["interval_high"], strict=True)
    verdicts = {"above": "faster", "below": "slower", "undecided": "undecided"}
    return table.assign(
        device=device,
        head="bf16",
        seq_len=1024,
        occasions=1,
        ratio=(table["interval_low"] + table["interval_high"]) / 2,
        verdict=[verdicts[side(low, high)] for low, high in ends],
    )


def test_a_recipe_pays_from_the_width_from_which_on_every_setting_is_faster() -> None:
    (payoff,) = decision.payoffs(
        timed(
            ("fused", 256, 1.1, 1.2),
            ("fused", 512, 0.9, 1.1),
            ("fused", 1024, 1.2, 1.3),
            ("fused", 1024, 1.1, 1.2),
            ("fused", 2048, 1.4, 1.5),
        )
    )
    assert (payoff.pays_from, payoff.never, payoff.everywhere) == (1024, False, False)
    assert (payoff.faster, payoff.settings, payoff.undecided) == (4, 5, (512,))
    assert (payoff.slowest, payoff.fastest) == pytest.approx((1.15, 1.45))


def test_a_recipe_that_is_faster_nowhere_never_pays_and_one_that_loses_at_the_widest_pays_from_nowhere() -> None:
    never, unsteady = decision.payoffs(
        timed(
            ("rowwise", 256, 0.7, 0.8),
            ("rowwise", 1024, 0.9, 1.1),
            ("tensorwise", 256, 1.1, 1.2),
            ("tensorwise", 512, 0.9, 1.1),
        )
    )[::-1]
    assert (never.recipe, never.never, never.pays_from) == ("rowwise", True, None)
    assert (unsteady.recipe, unsteady.never, unsteady.pays_from) == ("tensorwise", False, None)


def test_devices_have_payoffs_of_their_own_and_bf16_has_none() -> None:
    table = pd.concat(
        [
            timed(("fused", 768, 0.8, 0.9), ("te_bf16", 768, 1.0, 1.1), device="NVIDIA H100"),
            timed(("fused", 768, 1.1, 1.2), ("bf16", 768, 1.0, 1.0)),
        ]
    )
    found = {(payoff.device, payoff.recipe): payoff.never for payoff in decision.payoffs(table)}
    assert found == {("NVIDIA H200", "fused"): False, ("NVIDIA H100", "fused"): True}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(768, 1.1, 1.2), (1024, 1.2, 1.3), (2048, 1.3, 1.4)], "at every width timed, 768 to 2,048"),
        ([(768, 0.8, 0.9), (1024, 1.2, 1.3), (2048, 1.3, 1.4)], "from width 1,024 on (slower at 768)"),
        ([(768, 0.9, 1.1), (1024, 1.2, 1.3), (2048, 1.3, 1.4)], "at widths 1,024 to 2,048 (undecided at 768)"),
        ([(768, 0.8, 0.9), (2048, 1.3, 1.4)], "at width 2,048 alone (slower at 768)"),
        ([(2048, 1.3, 1.4)], "at 2,048, the only width timed"),
        ([(768, 0.8, 0.9), (2048, 0.9, 1.1)], "at no width timed (slower at 768, undecided at 2,048)"),
        ([(768, 1.1, 1.2), (2048, 0.9, 1.1)], "at 1 of 2 settings timed (undecided at 2,048)"),
    ],
)
def test_nothing_is_said_of_widths_that_were_not_timed(rows: list[tuple[int, float, float]], said: str) -> None:
    (payoff,) = decision.payoffs(timed(*(("fused", *row) for row in rows)))
    assert where(payoff) == said


@given(st.lists(st.tuples(st.sampled_from([256, 512, 1024]), st.floats(0.5, 2), st.floats(0, 0.3)), min_size=1))
def test_no_setting_from_that_width_on_is_slower_and_the_next_narrower_has_one(rows: list) -> None:
    table = timed(*(("fused", width, low, low + spread) for width, low, spread in rows))
    (payoff,) = decision.payoffs(table)
    if payoff.pays_from is None:
        assert (table[table["width"] == max(payoff.widths)]["interval_low"] <= 1).any()
        return
    assert (table[table["width"] >= payoff.pays_from]["interval_low"] > 1).all()
    narrower = [width for width in payoff.widths if width < payoff.pays_from]
    if narrower:
        assert (table[table["width"] == narrower[-1]]["interval_low"] <= 1).any()


def test_devices_are_never_pooled(tmp_path: Path) -> None:
    write_speed_records(tmp_path, "a")
    folder = write_speed_records(tmp_path, "b")
    edit(folder / "record.json", lambda record: record["provenance"].update(device_name="NVIDIA H100"))
    steps = records.read_table(folder, "steps")
    steps.loc[steps["recipe"] == "fused", "step_ms"] *= 2
    records.write_table(folder, "steps", steps)
    table = with_verdicts(speed_runs(tmp_path))
    ratios = table[table["recipe"] == "fused"].groupby(["device", "head", "model"])["ratio"].first()
    assert ratios["NVIDIA H100", "bf16", "1.5B"] == pytest.approx(1.45 / 2, rel=0.02)
    assert ratios["NVIDIA H200", "bf16", "1.5B"] == pytest.approx(1.45, rel=0.02)
    assert set(table.groupby("device")["runs"].first()) == {"speed-h200/a", "speed-h200/b"}


def edit(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_the_width_of_a_size_of_ones_own_is_the_plans(tmp_path: Path) -> None:
    write_speed_records(tmp_path, trained=SIZES[0])
    widths = with_verdicts(speed_runs(tmp_path)).groupby("model")["width"].first()
    assert widths.to_dict() == {"0.4M": 64, "125M": 768, "350M": 1024, "1.5B": 2048}


def gaps_of(records_dir: Path) -> list[losses.MeasuredGap]:
    return losses.measured_gaps(losses.measured_sets(records_dir))


def matched_of(records_dir: Path) -> dict[tuple[str, str], decision.Matched]:
    sets = losses.measured_sets(records_dir)
    timings = with_verdicts(speed_runs(records_dir))
    found = decision.loss_matched(sets, slopes.known_laws(sets), timings)
    return {(row.measured.size, row.measured.recipe): row for row in found}


def test_a_gap_comes_from_the_plan_with_most_seeds_and_never_from_the_demo(tmp_path: Path) -> None:
    write_demo_records(tmp_path, seeds=(1, 2, 3))
    assert gaps_of(tmp_path) == []
    write_gpu_records(tmp_path, sizes=SIZES[:1])
    assert {measured.gap.seeds for measured in gaps_of(tmp_path)} == {2}
    for seed in (1, 2, 3):
        for recipe in ("bf16", "fused"):
            write_run(tmp_path, "seeds-h200", SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
    seeds = {measured.recipe: measured.gap.seeds for measured in gaps_of(tmp_path)}
    assert seeds == {"tensorwise": 2, "fused": 3}


def add_branches(records_dir: Path) -> None:
    """BF16 runs of the second size that ended on half of the tokens, 0.2 nats higher."""
    for seed in (1, 2):
        stable = f"{SIZES[1].name}-bf16-s{seed}"
        folder = write_run(
            records_dir,
            "pilot-h200",
            SIZES[1],
            "bf16",
            seed=seed,
            budget=1,
            branch_of=stable,
            device_name="NVIDIA H200",
        )
        loss = json.loads((folder.parent / stable / "record.json").read_text())["final"]["validation_loss"]
        edit(folder / "record.json", lambda record, end=loss + 0.2: record["final"].update(validation_loss=end))


def test_the_first_page_quotes_the_gap_that_the_figure_draws(tmp_path: Path) -> None:
    """The pilot and the ladder differ, and one more seed in the larger plan decides for both pages."""
    for plan, seeds in (("ladder-h200", (1, 2)), ("pilot-h200", (1, 2)), ("seeds-h200", (1, 2, 3))):
        for seed in seeds:
            for recipe in ("bf16", "fused"):
                folder = write_run(tmp_path, plan, SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
                if recipe == "fused":
                    shift = 0.01 * seed * len(plan)
                    edit(folder / "record.json", lambda record, by=shift: add_loss(record, by))
    (measured,) = losses.telling([row.measured for row in frontpage.Evidence.read(tmp_path).matched])
    figure = figures.loss.loss_gaps(gaps_of(tmp_path))
    colour = figures.style.RECIPE_COLOURS["fused"].lower()
    (drawn,) = [line.get_ydata()[0] for line in figure.axes[0].lines if to_hex(line.get_color()) == colour]
    assert measured.gap.seeds == 3
    assert drawn == measured.gap.mean
    (row,) = tables.losses.loss_gaps(gaps_of(tmp_path)).to_dict("records")
    assert f"{row['FP8 − BF16 (nats/token)']} nats/token ({row['95% interval']}, 3 seeds)" in frontpage.lead(
        frontpage.Evidence.read(tmp_path)
    )


def test_the_lead_says_which_runs_its_gaps_are_without(tmp_path: Path) -> None:
    write_gpu_records(tmp_path, sizes=SIZES[:1])
    assert "diverged" not in frontpage.lead(frontpage.Evidence.read(tmp_path))
    folder = write_run(tmp_path, "pilot-h200", SIZES[0], "fused", seed=9, device_name="NVIDIA H200")
    edit(folder / "record.json", lambda record: record.update(status="diverged", final=None))
    lead = frontpage.lead(frontpage.Evidence.read(tmp_path))
    assert "Runs that diverged and are in no mean: 1 of `fused` at 0.4M." in lead


def add_loss(record: dict, nats: float) -> None:
    record["final"]["validation_loss"] += nats


def test_speed_is_put_to_the_loss_of_the_same_size_and_head(tmp_path: Path) -> None:
    write_gpu_records(tmp_path, sizes=SIZES[:2])
    write_speed_records(tmp_path, trained=SIZES[1])
    assert matched_of(tmp_path)["0.9M", "fused"].speedup is None
    add_branches(tmp_path)
    found = matched_of(tmp_path)
    assert found["0.4M", "fused"].speedup is None
    row = found["0.9M", "fused"]
    assert row.ratio is not None
    assert row.tokens is not None
    assert row.speedup is not None
    assert row.ratio.value == pytest.approx(1.09, rel=0.01)
    assert row.speedup.value == pytest.approx(row.ratio.value / row.tokens.value)
    assert row.speedup.interval is not None
    timing = with_verdicts(speed_runs(tmp_path)).set_index(["model", "recipe", "head"]).loc[("0.9M", "fused", "bf16")]
    assert row.ratio.interval == (timing["interval_low"], timing["interval_high"])


def test_speed_of_another_device_is_named(tmp_path: Path) -> None:
    write_gpu_records(tmp_path, sizes=SIZES[1:2])
    add_branches(tmp_path)
    folder = write_speed_records(tmp_path, trained=SIZES[1])
    edit(folder / "record.json", lambda record: record["provenance"].update(device_name="NVIDIA H100"))
    found = list(matched_of(tmp_path).values())
    assert {(row.device, row.trained_on) for row in found} == {("NVIDIA H100", "NVIDIA H200")}
    table = tables.speed.matched_table(found)
    assert set(table["timed on"] + table["trained on"]) == {"H100H200"}


def test_the_first_page_leads_with_speed_the_claim_and_the_loss(tmp_path: Path) -> None:
    write_gpu_records(tmp_path)
    for occasion in ("a", "b"):
        write_speed_records(tmp_path, occasion)
    evidence = frontpage.Evidence.read(tmp_path)
    lead = frontpage.lead(evidence)
    assert lead.startswith(
        "**On H200, in contexts of 1,024 and 2,048 tokens, `fused`, this project's kernels, trains faster"
    )
    assert "at every width timed, 768 to 2,048, 1.1" in lead
    assert "stock torchao at every width timed, 768 to 2,048" in lead
    assert "`rowwise` at no width timed" in lead
    assert (
        "claims, contradicted here (@tbl-scoreboard): *FP8's loss curve follows BF16's.* `tensorwise` at 0.4M" in lead
    )
    assert "*torchao's FP8 trains 40% faster at 1.5B.* torchao's fastest recipe as it ships" in lead
    assert "second occasion" not in lead
    assert "FP8 ends at a higher loss, by 95% intervals that exclude zero: +" in lead
    assert "untested" in frontpage.costs(evidence)
    verdicts = re.findall(r"^\|[^|]+\| \*\*(\w+)\*\*", frontpage.scoreboard(evidence.findings), re.MULTILINE)
    assert verdicts == sorted(verdicts, key=frontpage.VERDICTS.index)
    assert verdicts[0] == "contradicted"


def test_what_one_occasion_gave_is_not_called_confirmed(tmp_path: Path) -> None:
    write_gpu_records(tmp_path)
    write_speed_records(tmp_path)
    lead = frontpage.lead(frontpage.Evidence.read(tmp_path))
    assert "None of this has been confirmed by a second occasion." in lead
    assert "40%" not in lead


def test_the_speed_map_is_on_the_page_and_apart_from_whole_models(tmp_path: Path) -> None:
    write_gpu_records(tmp_path)
    write_speed_records(tmp_path)
    write_map_records(tmp_path)
    evidence = frontpage.Evidence.read(tmp_path)
    assert {payoff.device for payoff in evidence.map_payoffs} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert {payoff.widths[-1] for payoff in evidence.payoffs} == {2048}
    assert {payoff.settings for payoff in evidence.with_head("bf16")} == {3}
    (told,) = [said for said in frontpage.conclusions(evidence) if said.startswith("**Speed map**")]
    assert "On H100" in told
    assert "On H200" in told
    fewest, waiting = min(roofline.MAP_TOKENS), 2 * len(roofline.MAP_WIDTHS)
    for device in ("H100", "H200"):
        cells = waiting * len(roofline.MAP_TOKENS)
        assert f"In {waiting} of {cells} cells on {device} the GPU waited for the host: at {fewest:,} tokens a" in told
        assert f"micro-batch width 256, 512, 768, 1,024 and 2,048 (@fig-break-even-{device.lower()})" in told
    # By the fixture, blocks of width 256 are slower whatever the tokens, and only with few of them does the GPU wait.
    lead = frontpage.lead(evidence)
    assert "`fused` gives 0.88 times BF16's tokens/s in 2 of 10 settings on H200: at 8,192 tokens a" in lead
    assert "micro-batch width 256, at 65,536 width 256 (@fig-break-even-h200)" in lead
    points = switch.chart_points(evidence.timings, evidence.drawn)
    panels = [panel["title"] for panel in switch.switch_chart_spec(points, toy=False, label="switch")["panels"]]
    assert sum(title.startswith("Blocks of four layers") for title in panels) == 2
    assert sum(title.startswith("Whole models") for title in panels) == 1


def test_the_setting_is_that_of_every_run_that_the_page_rests_on(tmp_path: Path) -> None:
    write_gpu_records(tmp_path)
    scored = write_run(tmp_path, "ladder-h200", OTHER_SIZES[1], "bf16", device_name="NVIDIA H100 80GB HBM3")
    edit(scored / "record.json", lambda record: record["speed"].update(wall_seconds=3600.0))
    said = frontpage.setting(frontpage.Evidence.read(tmp_path))
    assert "NVIDIA H100 80GB HBM3 (1.1M parameters) and NVIDIA H200 (0.4M, 0.9M and 2.2M parameters)" in said
    assert "longer than 60.0 minutes" in said
    assert f"trained {listing(CLAIMED_TRAININGS)}" in said


def test_the_first_page_says_what_was_not_measured(tmp_path: Path) -> None:
    empty = frontpage.Evidence.read(tmp_path)
    assert "No speed was measured" in frontpage.lead(empty)
    assert frontpage.conclusions(empty) == []
    assert {finding.verdict for finding in empty.findings} == {"untested"}
    assert "@" not in frontpage.scoreboard(empty.findings).replace("@tbl-published", "")
    write_demo_records(tmp_path)
    demo = frontpage.Evidence.read(tmp_path)
    assert "toy size trained on a CPU" in frontpage.setting(demo)
    assert {finding.verdict for finding in demo.findings} == {"untested"}


def test_how_fp8_ran_is_what_the_records_say(tmp_path: Path) -> None:
    def answer() -> str:
        return frontpage.lead(frontpage.Evidence.read(tmp_path)).partition("`fp8lab speed")[0]

    assert "FP8 ran" not in answer()
    write_demo_records(tmp_path)
    assert "FP8 ran emulated" in answer()
    write_gpu_records(tmp_path)
    assert "FP8 ran in hardware, and none of its steps were timed" in answer()


def test_scores_are_spoken_of_where_something_was_scored(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "pilot-h200", SIZES[0], "bf16", device_name="NVIDIA H200")
    write_run(tmp_path, "pilot-h200", SIZES[0], "fused", device_name="NVIDIA H200")
    for path in folder.parent.glob("*/eval.json"):
        path.unlink()
    assert "Losses were measured here on" in frontpage.setting(frontpage.Evidence.read(tmp_path))
    write_run(tmp_path, "pilot-h200", SIZES[0], "tensorwise", device_name="NVIDIA H200")
    assert "Losses and scores were measured here on" in frontpage.setting(frontpage.Evidence.read(tmp_path))


def write_pairs(records_dir: Path, plan: str, model: ModelConfig, budget: float) -> None:
    """Three seeds of BF16 and `fused`, on a GPU."""
    for seed in (1, 2, 3):
        for recipe, gap in (("bf16", 0.0), ("fused", 0.002)):
            loss = 3.0 + 0.001 * seed + gap
            write_run(
                records_dir,
                plan,
                model,
                recipe,
                seed=seed,
                budget=budget,
                final_loss=loss,
                device_name="NVIDIA H200",
            )


def test_an_unknown_slope_is_why_the_speed_at_matched_loss_is_untested(tmp_path: Path) -> None:
    write_pairs(tmp_path, "125m-h200", MODELS["125M"], budget=5)
    write_speed_records(tmp_path)
    costs = frontpage.costs(frontpage.Evidence.read(tmp_path))
    assert (
        "At the end of a training the loss falls too little, or by an unknown amount, at 125M, so the speed-up" in costs
    )
    assert "by the published law, the lower end" in costs


def test_a_speed_at_matched_loss_says_what_leaves_it_without_an_interval(tmp_path: Path) -> None:
    write_pairs(tmp_path, "article", MODELS["350M"], budget=20)
    write_speed_records(tmp_path)
    evidence = frontpage.Evidence.read(tmp_path)
    costs = frontpage.costs(evidence)
    (row,) = evidence.matched
    assert row.speedup is not None
    assert f"At matched loss `fused` is {row.speedup.text()} times as fast as BF16 at 350M" in costs
    assert "(@tbl-matched; without an interval: a slope by the published law alone)" in costs
    assert "untested" not in costs


def test_the_law_that_prices_a_speed_is_named(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    own = replace(slopes.PUBLISHED_LAW, source="law of ladder-h200")
    costs = frontpage.costs(replace(frontpage.Evidence.read(tmp_path), laws=[own, slopes.PUBLISHED_LAW]))
    assert "No size was both timed and trained in the same FP8 recipe, so" in costs
    assert "by the law of ladder-h200, the lower end of the speed of `fused` at 1.5B" in costs


def test_a_gap_at_another_learning_rate_than_the_ladders_stands_beside_the_ladders(tmp_path: Path) -> None:
    def halve_rate(record: dict[str, Any]) -> None:
        record["config"]["optimizer"]["peak_learning_rate"] /= 2

    for plan, seeds in (("ladder-h200", 1), ("pilot-h200", 3), ("seeds-h200", 5)):
        for seed in range(1, seeds + 1):
            for recipe, loss in (("bf16", 3.0), ("fused", 3.02 + 0.01 * len(plan))):
                loss += 0.001 * seed
                folder = write_run(
                    tmp_path, plan, SIZES[0], recipe, seed=seed, final_loss=loss, device_name="NVIDIA H200"
                )
                if plan == "seeds-h200":
                    edit(folder / "record.json", halve_rate)
    evidence = frontpage.Evidence.read(tmp_path)
    at_ladders = plan_runs(tmp_path, "pilot-h200").gap("0.4M", "fused")
    told = "Trained at 0.5 times the ladder's learning rate: `fused` at 0.4M."
    lead = frontpage.lead(evidence)
    assert told in lead
    assert f"At the ladder's rate FP8 − BF16 is {at_ladders.text('nats/token')} with `fused` at 0.4M." in lead
    rates = tables.losses.loss_gaps([row.measured for row in evidence.matched])["learning rate"]
    assert rates.astype(float).tolist() == [evidence.matched[0].measured.baseline.learning_rate]
    for folder in tmp_path.glob("seeds-h200/*"):
        shutil.rmtree(folder)
    assert told not in frontpage.lead(frontpage.Evidence.read(tmp_path))


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "pilot-h200", SIZES[0], recipe, device_name="NVIDIA H200")
    evidence = frontpage.Evidence.read(tmp_path)
    known = re.compile(r"Not shown to differ from zero: FP8 − BF16 is \S+ nats/token \(one seed\) with `fused` at 0.4M")
    assert known.search(frontpage.lead(evidence))
    assert not known.search(frontpage.costs(evidence)), "said once"


def test_what_seeds_leave_open_follows_where_the_first_paragraph_has_what_they_settle(tmp_path: Path) -> None:
    for seed in (1, 2, 3, 4):
        for recipe, loss in (("bf16", 3.0), ("fused", 3.2)):
            loss += 0.001 * seed
            write_run(tmp_path, "pilot-h200", SIZES[0], recipe, seed=seed, final_loss=loss, device_name="NVIDIA H200")
    write_run(tmp_path, "pilot-h200", SIZES[0], "rowwise", final_loss=3.05, device_name="NVIDIA H200")
    evidence = frontpage.Evidence.read(tmp_path)
    assert "higher loss, by 95% intervals that exclude zero: +0.19" in frontpage.lead(evidence)
    assert "rowwise" not in frontpage.lead(evidence)
    assert "Not shown to differ from zero: FP8 − BF16 is +0.0" in frontpage.costs(evidence)
    assert "with `rowwise` at 0.4M" in frontpage.costs(evidence)


def test_each_device_has_figures_of_its_own_and_a_claim_points_to_those_that_it_rests_on(tmp_path: Path) -> None:
    write_speed_records(tmp_path, "a")
    folder = write_speed_records(tmp_path, "b")
    edit(folder / "record.json", lambda record: record["provenance"].update(device_name="NVIDIA H100 80GB HBM3"))
    steps = records.read_table(folder, "steps")
    steps.loc[steps["recipe"] == "tensorwise", "step_ms"] /= 2
    records.write_table(folder, "steps", steps)
    evidence = frontpage.Evidence.read(tmp_path)
    (finding,) = [finding for finding in evidence.findings if "40%" in finding.claim]
    assert set(finding.reference.split(" and ")) == {"@fig-throughput-h100-80gb-hbm3", "@fig-throughput-h200"}
    said = " ".join(frontpage.conclusions(evidence))
    both = {f"@fig-{what}-{device}" for what in ("throughput", "memory") for device in ("h200", "h100-80gb-hbm3")}
    assert both <= set(re.findall(r"@[a-z0-9-]+", said))
    alone = frontpage.conclusions(
        replace(evidence, timings=evidence.timings[evidence.timings["device"] == "NVIDIA H200"])
    )
    assert {"@fig-throughput-h200", "@fig-memory-h200"} < set(re.findall(r"@[a-z0-9-]+", " ".join(alone)))


def test_the_interactive_chart_holds_every_point_of_the_picture(tmp_path: Path) -> None:
    write_gpu_records(tmp_path)
    write_speed_records(tmp_path)
    evidence = frontpage.Evidence.read(tmp_path)
    points = switch.chart_points(evidence.timings, evidence.drawn)
    drawn = switch.switch_chart(points, toy=False)
    marks = [sum(line.get_marker() not in ("None", None, "") for line in axes.lines) for axes in drawn.axes]
    spec = switch.switch_chart_spec(points, toy=False, label="switch")
    assert [len(panel["points"]) for panel in spec["panels"]] == marks == [3 * 4, 3 * 3 * 2]


def test_many_seeds_are_drawn_beside_the_ladders_one_and_never_beside_the_demo(tmp_path: Path) -> None:
    for recipe in ("bf16", "fused"):
        for seed in (1, 2, 3):
            write_run(tmp_path, "seeds-h200", SIZES[0], recipe, seed=seed, device_name="NVIDIA H200")
        write_run(tmp_path, "demo", SIZES[0], recipe)
    demo = frontpage.Evidence.read(tmp_path)
    assert [runs.plan for runs in demo.drawn] == ["demo"]
    for recipe in ("bf16", "fused"):
        write_run(tmp_path, "ladder-h200", SIZES[0], recipe, device_name="NVIDIA H200")
    evidence = frontpage.Evidence.read(tmp_path)
    points = switch.chart_points(evidence.timings, evidence.drawn)
    assert points["panel"].value_counts().to_dict() == {
        "Loss of every run of ladder-h200 against BF16": 2,
        "Loss of every run of seeds-h200 against BF16": 6,
    }
    # Each plan's losses are held against its own BF16.
    own = points[points["panel"].str.contains("seeds") & (points["series"] == "bf16")]
    assert own["y"].sum() == pytest.approx(0, abs=1e-9)


def test_the_device_with_most_settings_is_drawn_first(tmp_path: Path) -> None:
    write_speed_records(tmp_path)
    timings = frontpage.Evidence.read(tmp_path).timings
    other = timings[timings["model"] == "1.5B"].assign(device="Another GPU")
    both = pd.concat([other, timings])
    points = switch.chart_points(both, [])
    assert len(points) == (both["recipe"] != "bf16").sum()
    assert [panel.split(":")[0] for panel in points["panel"].unique()] == [
        "Whole models on NVIDIA H200",
        "Whole models on Another GPU",
    ]


def test_data_of_a_chart_can_end_neither_its_script_nor_the_raw_block() -> None:
    nasty = "</script><script>alert(1)</script>\n```\n<!-- &amp; `x`"
    page = chart_html({"figure": nasty, "series": [], "panels": []})
    (data,) = re.findall(r'class="chart-data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["figure"] == nasty
    assert not set("<>&`\n") & set(data)
    assert "```" not in page


@pytest.mark.parametrize(("shift", "which"), [(0.05, "higher"), (-0.05, "lower")])
def test_the_side_on_which_fp8s_loss_ends_is_said(tmp_path: Path, shift: float, which: str) -> None:
    write_gpu_records(tmp_path, measured=Measured(gap_shift=shift))
    costs = loss_costs(frontpage.Evidence.read(tmp_path))
    assert costs.startswith(f"FP8 ends at a {which} loss, by 95% intervals that exclude zero: ")
    assert ("−" in costs.split(" nats/token")[0]) == (shift < 0)
