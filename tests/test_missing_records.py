"""The article is made from the records that there are: a run or setting that is missing takes its displays with it."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fp8lab import records
from fp8lab.analysis import timings
from fp8lab.analysis.occasions import speed_runs
from tests.chapters import shown
from tests.fixtures import OTHER_SIZES, SIZES, write_gpu_records, write_speed_records
from tests.projects import copy_sources


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The article's sources."""
    root = tmp_path_factory.mktemp("article")
    copy_sources(root)
    return root


def rendered(root: Path, records_dir: Path, *chapters: str) -> str:
    """What the chapters display, one after another."""
    paths = [root / "index.ipynb" if name == "index" else root / "chapters" / f"{name}.ipynb" for name in chapters]
    return "\n".join(display.text for path in paths for display in shown(path, root, records_dir))


def keep_steps(folder: Path, kept: Callable[[pd.DataFrame], pd.Series]) -> None:
    path = folder / "steps.parquet"
    steps = pd.read_parquet(path)
    steps[kept(steps)].to_parquet(path)


SPEED_CHAPTERS = ("index", "stability", "throughput")


def test_a_setting_at_which_bf16_had_too_little_memory_is_named_and_the_others_are_shown(
    root: Path, tmp_path: Path
) -> None:
    folder = write_speed_records(tmp_path)
    keep_steps(folder, lambda steps: (steps["model"] != "1.5B") | (steps["recipe"] != "bf16"))
    text = rendered(root, tmp_path, *SPEED_CHAPTERS)
    assert "1.5B-T2048-B16 (no BF16 beside it)" in text
    assert "`fused`, this project's kernels, trains faster than BF16 at every width timed, 768 to 1,024" in text


def test_a_device_on_which_every_case_failed_stops_no_chapter_and_is_named(root: Path, tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    alone = rendered(root, tmp_path, "index")
    failed = tmp_path / "speed-h100" / "2026-01-05-a"
    shutil.copytree(folder, failed)
    record = json.loads((failed / "record.json").read_text()) | {"plan": "speed-h100", "run": failed.name}
    record["provenance"]["device_name"] = "NVIDIA H100 80GB HBM3"
    record["results"]["cases"] = {"1.5B-T2048-B16": {"error": "OutOfMemoryError: CUDA out of memory", "traceback": ""}}
    (failed / "record.json").write_text(json.dumps(record))
    records.write_table(failed, "steps", pd.DataFrame([], columns=list(records.COLUMNS["steps"])))
    assert rendered(root, tmp_path, "index") == alone
    together, good = speed_runs(tmp_path), speed_runs(tmp_path, "speed-h200")
    pd.testing.assert_frame_equal(timings.speed_ratios(together), timings.speed_ratios(good))
    text = rendered(root, tmp_path, "stability", "throughput")
    told = "Not compared on NVIDIA H100 80GB HBM3: 1.5B-T2048-B16 (OutOfMemoryError: CUDA out of memory)."
    assert told in html.unescape(text)


def test_where_no_bf16_fitted_nothing_is_called_measured(root: Path, tmp_path: Path) -> None:
    keep_steps(write_speed_records(tmp_path), lambda steps: steps["recipe"] != "bf16")
    text = rendered(root, tmp_path, *SPEED_CHAPTERS)
    assert "FP8 was timed, but no BF16 beside it, so there is no ratio to show" in text
    assert "125M-T1024-B64 (no BF16 beside it)" in text
    assert "FP8 needs tensor cores" not in text


def test_heads_in_fp8_alone_are_shown_as_such(root: Path, tmp_path: Path) -> None:
    keep_steps(write_speed_records(tmp_path), lambda steps: (steps["recipe"] == "bf16") | (steps["head"] == "fp8"))
    text = rendered(root, tmp_path, *SPEED_CHAPTERS)
    assert "**No recipe was timed with its output head in BF16**" in text
    assert "With it in FP8 too, `fused` is on H200 faster than BF16" in text


def test_peers_alone_are_shown_and_take_no_row_of_the_decision(root: Path, tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    keep_steps(folder, lambda steps: steps["recipe"].isin(["bf16", "tensorwise"]))
    path = folder / "steps.parquet"
    steps = pd.read_parquet(path)
    steps.assign(recipe=steps["recipe"].replace("tensorwise", "te_current")).to_parquet(path)
    text = rendered(root, tmp_path, *SPEED_CHAPTERS)
    assert "`te_current`: faster at every width timed" in text


def test_memory_is_told_beside_a_peers_bf16_where_ours_did_not_fit(root: Path, tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    path = folder / "steps.parquet"
    steps = pd.read_parquet(path)
    steps.assign(recipe=steps["recipe"].replace("bf16", "te_bf16")).to_parquet(path)
    text = rendered(root, tmp_path, "index", "throughput")
    assert "The peak over BF16's: 0.78 with" in text
    assert "nan" not in text


def slow_down(folder: Path, recipe: str, factor: float) -> None:
    """The last round of one recipe at 1.5B takes `factor` times as long."""
    path = folder / "steps.parquet"
    steps = pd.read_parquet(path)
    slowed = (steps["recipe"] == recipe) & (steps["model"] == "1.5B") & (steps["round"] == steps["round"].max())
    steps.loc[slowed, "step_ms"] *= factor
    steps.to_parquet(path)


def test_first_rounds_flatter_fp8_only_where_its_steps_grew_more_than_bf16s(root: Path, tmp_path: Path) -> None:
    slow_down(write_speed_records(tmp_path), "bf16", 1.06)
    assert "flatter FP8" not in rendered(root, tmp_path, "throughput")
    slow_down(write_speed_records(tmp_path), "tensorwise", 1.06)
    text = rendered(root, tmp_path, "throughput")
    assert "the steps of `tensorwise` with its head in BF16 changed by +6." in text
    assert "while its clock went from 1,800 to 1,800 MHz at 650 W" in text


def test_a_clock_without_readings_is_not_told(root: Path, tmp_path: Path) -> None:
    folder = write_speed_records(tmp_path)
    slow_down(folder, "tensorwise", 1.06)
    path = folder / "steps.parquet"
    pd.read_parquet(path).assign(sm_clock_mhz=float("nan"), power_w=float("nan")).to_parquet(path)
    text = rendered(root, tmp_path, "throughput")
    assert "flatter FP8" in text
    assert "nan" not in text


FOUR_SIZES = (*SIZES, OTHER_SIZES[-1])


def end_without_loss(records_dir: Path, size: str, *, in_bf16: bool) -> None:
    """Every run of one side of a size diverges."""
    for path in records_dir.glob(f"pilot-h200/{size}-*/record.json"):
        record = json.loads(path.read_text())
        if (record["recipe"] == "bf16") == in_bf16:
            path.write_text(json.dumps(record | {"status": "diverged", "final": None, "reason": "loss is NaN"}))


@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.parametrize("size", [model.name for model in FOUR_SIZES])
def test_a_size_of_which_one_side_diverged_leaves_the_others_on_every_page(
    root: Path, tmp_path: Path, size: str, in_bf16: bool
) -> None:
    write_gpu_records(tmp_path, sizes=FOUR_SIZES)
    end_without_loss(tmp_path, size, in_bf16=in_bf16)
    text = rendered(root, tmp_path, "index", "stability", "scaling")
    others = [model.name for model in FOUR_SIZES if model.name != size]
    (gaps,) = re.findall(r"(?s)\{#tbl-gaps\}(.*?):::", text)
    assert [name for name in (size, *others) if f">{name}<" in gaps] == others
    assert f"Here is the difference at {others[0] if size == SIZES[0].name else SIZES[0].name} on" in text


def test_bf16_at_two_sizes_makes_no_scaling_law(root: Path, tmp_path: Path) -> None:
    write_gpu_records(tmp_path)
    end_without_loss(tmp_path, SIZES[-1].name, in_bf16=True)
    text = rendered(root, tmp_path, "scaling")
    assert "there is no record of that yet" in text
    assert "fig-panels" not in text


def test_scores_of_different_sizes_are_not_compared(root: Path, tmp_path: Path) -> None:
    write_gpu_records(tmp_path, sizes=SIZES[:2])
    for path in tmp_path.glob("pilot-h200/*/eval.json"):
        if ("bf16" in path.parent.name) == path.parent.name.startswith(SIZES[0].name):
            path.unlink()
    text = rendered(root, tmp_path, "benchmarks")
    assert "fig-scores" in text
    assert "nan" not in text
