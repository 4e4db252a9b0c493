"""Every number of the article follows the records, and each display follows its own kinds of record.

The chapters run in this process on the same small records with one kind changed at a time: all training records and
none of their tables, all timed steps and nothing else. A figure, table or paragraph that does not change with a kind
that it is drawn from, or changes with another, fails by name; so does a number that no change of records moves.
"""

from __future__ import annotations

import difflib
import html
import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from fp8lab.analysis import scores, timings
from fp8lab.analysis.occasions import speed_runs
from fp8lab.publish import read_book
from tests.chapters import Shown, shown
from tests.fixtures import (
    DEFAULT,
    LADDER,
    LADDER_LAW,
    OTHER,
    OTHER_LADDER,
    OTHER_LADDER_LAW,
    OTHER_SIZES,
    write_ladder_records,
)
from tests.projects import ROOT, copy_sources, write_every_kind

# One worker runs the chapters, each at most once on each set of records.
pytestmark = pytest.mark.xdist_group("numbers")

CHAPTERS = [chapter.name for chapter in read_book(ROOT).chapters]
FILES = {
    "train": "record.json",
    "speed": "record.json",
    "data": "record.json",
    "benchmark": "record.json",
    "test": "record.json",
    "eval": "eval.json",
    "metrics": "metrics.parquet",
    "validation": "validation.parquet",
    "health": "health.parquet",
    "steps": "steps.parquet",
}
"""The kinds of record, and the tables beside them: the file that holds each."""

DISPLAYS: dict[str, tuple[str, str]] = {
    "index 3": ("eval metrics speed steps train", "1 2 10 256 256, 8,192 65,536"),
    "fig-switch": ("steps train", ""),
    "index 4": ("speed steps train", ""),
    "tbl-switch": ("steps", "1 16 20 32 64"),
    "index 6": ("health speed steps train", "1 1, 2 256 256, 512 512, 768, 8,192 20"),
    "tbl-scoreboard": ("eval steps train", "0 2 20 3 4 5 8"),
    "tbl-conversion": ("", "1 4"),
    "approach 3": ("", "16"),
    "tbl-conventions": ("", "12 4 6"),
    "tbl-data": ("data", ""),
    "fig-data": ("data", ""),
    "data 3": ("data", ""),
    "data 4": ("train", ""),
    "data 6": ("train", "1"),
    "stability 3": ("train", "0 6"),
    "fig-curves-largest": ("metrics train", ""),
    "fig-curves-smallest": ("metrics", ""),
    "fig-validation": ("data train validation", ""),
    "tbl-gaps": ("train", "0.0015 0.00075 2"),
    "fig-gaps": ("train", ""),
    "tbl-matched": ("steps train", "2"),
    "fig-runs-needed": ("train", ""),
    "stability variance": ("train", "6"),
    "tbl-variance": ("train", ""),
    "tbl-variance-gaps": ("train", ""),
    "stability numerics": ("train", ""),
    "tbl-numerics-h200": ("train", "2"),
    "fig-domains": ("train", ""),
    "stability starts": ("health metrics train", "1 60"),
    "tbl-starts": ("metrics train", "1 60"),
    "fig-start-3-2m": ("health metrics", ""),
    "tbl-underflow-starts": ("health", "1 3"),
    "fig-gradients": ("metrics", ""),
    "tbl-spikes": ("metrics train", "0 1 120 2 60"),
    "stability 8": ("train", ""),
    "stability health": ("health train", "1 18 20 32 60"),
    "tbl-rounding-losses": ("health", ""),
    "tbl-health": ("health", "0"),
    "tbl-underflow-by-size": ("health", ""),
    "fig-underflow-tensorwise": ("health", ""),
    "fig-amax-tensorwise": ("health", ""),
    "fig-underflow-fused": ("health", ""),
    "fig-amax-fused": ("health", ""),
    "fig-swiglu": ("health", ""),
    "fig-kurtosis": ("health", "3"),
    "fig-panels": ("metrics train", "6"),
    "tbl-runs": ("train", "1 2"),
    "scaling 6": ("train", ""),
    "scaling 8": ("", "1 3"),
    "tbl-by-flops": ("train", "12 3 6"),
    "scaling 19": ("train", "9"),
    "throughput 3": ("steps", "1 12 16"),
    "fig-throughput-h200": ("steps", "1"),
    "tbl-speed-h200": ("steps", "1 16 64"),
    "fig-breakdown-0-h200": ("speed", "1 16"),
    "tbl-ceiling-h200": ("speed steps", "1 16"),
    "fig-memory-h200": ("steps", "1"),
    "tbl-scaling-out": ("train", "1 100.0% 2"),
    "throughput cb1d50b1": ("speed", ""),
    "tbl-warmup": ("speed", "4"),
    "throughput loss-cost": ("train", "1 2"),
    "throughput 29adfaff": ("steps", "1,320 3.35 4.8 55% 690 77% 90%"),
    "fig-roofline": ("steps", ""),
    "tbl-roofline": ("steps", "16 64"),
    "throughput d64f0f0e": ("speed steps", "1 1, 20 256 8,192"),
    "fig-break-even-h200": ("speed steps", ""),
    "fig-break-even-h100": ("speed steps", ""),
    "benchmarks 3": ("eval", ""),
    "fig-scores": ("eval", ""),
    "tbl-scores": ("eval", ""),
    "tbl-answer-bits": ("eval", ""),
    "benchmarks answer-bits": ("eval", ""),
    "benchmarks 4": ("eval", "0 18"),
    "benchmarks said": ("eval", ""),
    "tbl-faults": ("test", "2"),
    "tbl-measured": ("test", "2"),
    "tbl-costs": ("benchmark", "1 2"),
    "reliability 9": ("benchmark", ""),
    "tbl-resumed": ("benchmark", ""),
    "end-notes 2": ("train", ""),
    "tbl-demo": ("train", "1"),
    "reproduce 3": ("train", "2"),
    "fig-demo": ("metrics train", ""),
    "tbl-provenance": ("train", "00 05 2"),
    "tbl-benchmarks": ("benchmark", "2"),
}
"""By label or, of a cell's prose, by chapter and cell: the kinds it is drawn from, and the small numbers in it that no
record moves (counts that the fixtures share, what a caption defines)."""
CONSTANTS = {
    # Names, widths and batches of the timed settings.
    *("125M", "250M", "350M", "1.5B", "1024", "1024,", "2048", "2048,", "768", "1,024", "2,048", "65.5k", "32.8k"),
    "1.000",  # BF16 relative to itself
    "95%",  # level of an interval
    *("0.005", "0.01"),  # half-width and margin that claims are held against
    *("1%", "0.01%"),  # limits of underflow and saturation
    "-9",  # the signal of `kill -9`
    *("25%", "50%"),  # guessing among four and two choices
    *("0.076", "4%", "200", "1.40", "40%"),  # published, cited beside them
    *("3%", "5%", "10%", "10M", "0.80"),  # the limits in the rules of the claims; goals
    *("2026", "3.11", "2.13"),  # year, and versions of Python and torch
}
ARITHMETIC = {"motivation 2", "tbl-gap-cost", "tbl-planned", "tbl-bound", "throughput 5", "throughput 6"}
"""Displays of published constants, plans and arithmetic: drawn from no record, and said to be."""
DEFINITIONS = {
    *("95%", "1.4", "-9"),  # level of an interval; the root of 2; a signal
    *("448", "57,344", "16", "10"),  # FP8's largest numbers, the multiple its GEMMs need, 1e-12
    *("1,024", "125M", "350M"),  # where `fused` and torchao's helper leave layers out
    *("2024", "2025", "3.11", "40%"),  # years, a version, the claim
}
"""Numbers of Markdown cells that no source need be cited for."""
NUMBER = re.compile(r"(?<![\w.#/@-])[+−-]?\d[\d,]*(?:\.\d+)?(?:e[-−]?\d+)?[%kMBT×]?(?!\w)")


class Edition:
    """What every chapter shows on one set of records."""

    def __init__(self, root: Path, records_dir: Path) -> None:
        self.records_dir = records_dir
        self._root = root
        self._shown: dict[str, dict[str, str]] = {}

    def displays(self, chapter: str) -> dict[str, str]:
        """Its Markdown by label or, of a cell's prose, by chapter and cell."""
        if chapter not in self._shown:
            (source,) = [one.source for one in read_book(self._root).chapters if one.name == chapter]
            found: dict[str, list[Shown]] = defaultdict(list)
            for display in shown(source, self._root, self.records_dir):
                found[display.label or f"{chapter} {display.cell}"].append(display)
            self._shown[chapter] = {key: "\n".join(one.text for one in displays) for key, displays in found.items()}
        return self._shown[chapter]


@pytest.fixture(scope="module")
def editions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Edition]:
    """On the same records as they are; with each kind changed; with other models; and with fewer of everything."""
    root = tmp_path_factory.mktemp("editions")
    copy_sources(root)
    plain = write_every_kind(root / "plain")
    others = write_every_kind(root / "others", replace(OTHER, seeds=DEFAULT.seeds))
    folders = {
        "plain": plain,
        "others": others,
        "models": write_every_kind(root / "models", sizes=OTHER_SIZES),
        "fewer": with_fewer(plain, root / "fewer"),
    }
    folders |= {kind: with_one_kind(kind, plain, others, root / kind) for kind in FILES}
    return {name: Edition(root, folder) for name, folder in folders.items()}


def kind_of(path: Path) -> str:
    return str(json.loads(path.read_text())["kind"]) if path.name == "record.json" else path.stem


def with_one_kind(kind: str, records_dir: Path, others: Path, folder: Path) -> Path:
    """A copy of `records_dir` whose files of one kind come from `others`."""
    shutil.copytree(records_dir, folder)
    for path in others.rglob(FILES[kind]):
        if kind_of(path) == kind:
            shutil.copy(path, folder / path.relative_to(others))
    return folder


def with_fewer(records_dir: Path, folder: Path) -> Path:
    """A copy of `records_dir` with some runs, a setting, a round and a report less."""
    shutil.copytree(records_dir, folder)
    for runs in ("pilot-h200/*-fused-s2", "demo/*-rowwise-s1", "variance-h200/*-s15-*", "numerics-h200/*-s15-*"):
        for path in folder.glob(runs):
            shutil.rmtree(path)
    for path in folder.glob("speed-*/*/steps.parquet"):
        steps = pd.read_parquet(path)
        kept = (steps["round"] < steps["round"].max()) & ~((steps["recipe"] == "rowwise") & (steps["model"] == "350M"))
        steps[kept].to_parquet(path)
    for path in folder.rglob("record.json"):
        record = json.loads(path.read_text())
        if "results" in record:
            path.write_text(json.dumps(record | {"results": shortened(record["results"])}))
    return folder


def shortened(results: Any) -> Any:
    """Lists of rounds without their last, of reports without their first."""
    if not isinstance(results, dict):
        return results
    shorter = {"rounds": lambda values: values[:-1], "faults": lambda values: values[1:]}
    return {key: shorter[key](value) if key in shorter else shortened(value) for key, value in results.items()}


def kinds_of(chapter: str, displays: dict[str, str]) -> set[str]:
    """Kinds that some display of a chapter is drawn from."""
    return {kind for key in displays for kind in DISPLAYS.get(key, ("", ""))[0].split()}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_display_follows_its_own_kinds_of_record(editions: dict[str, Edition], chapter: str) -> None:
    before = editions["plain"].displays(chapter)
    after = {kind: editions[kind].displays(chapter) for kind in sorted(kinds_of(chapter, before))}
    found = {
        key: " ".join(kind for kind, displays in after.items() if displays.get(key) != text)
        for key, text in before.items()
    }
    expected = {key: " ".join(sorted(DISPLAYS.get(key, ("", ""))[0].split())) for key in before}
    assert found == expected


def test_every_display_that_is_expected_is_shown(editions: dict[str, Edition]) -> None:
    displays = {key for chapter in CHAPTERS for key in editions["plain"].displays(chapter)}
    assert set(DISPLAYS) | ARITHMETIC <= displays


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_number_is_typed_by_hand(editions: dict[str, Edition], chapter: str) -> None:
    before = editions["plain"].displays(chapter)
    changes = [editions[name].displays(chapter) for name in ("models", "fewer", *sorted(kinds_of(chapter, before)))]
    for key, text in before.items():
        if key in ARITHMETIC:
            continue
        numbers = numbers_in(text)
        still = set(range(len(numbers)))
        for displays in changes:
            still &= unmoved(numbers, numbers_in(displays.get(key, "")))
        known = CONSTANTS | set(DISPLAYS.get(key, ("", ""))[1].split())
        known |= predicted(editions["plain"]) if key == "tbl-roofline" else set()
        known |= published() if key in ("tbl-published", "benchmarks said") else set()
        assert {numbers[index] for index in still} - known == set(), f"{key}: typed by hand? {prose(text)[:300]}"


def prose(text: str) -> str:
    """Without tags, pictures and scripts, and each character as a reader sees it."""
    return html.unescape(re.sub(r"(?s)```\{=html\}.*|<[^>]*>|\(drawn:[^)]*\)|[ᵃᵇᶜᵈ]", " ", text))


def numbers_in(text: str) -> list[str]:
    return NUMBER.findall(prose(text))


def unmoved(before: list[str], after: list[str]) -> set[int]:
    """Places in `before` of the numbers that stand in `after` too: in the same place, or in the same order."""
    if len(before) == len(after):
        return {index for index, (one, other) in enumerate(zip(before, after, strict=True)) if one == other}
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    return {index for block in blocks for index in range(block.a, block.a + block.size)}


def predicted(edition: Edition) -> set[str]:
    """What the roofline says of the settings timed, as its table writes it."""
    table = timings.roofline_against_measurement(speed_runs(edition.records_dir))
    return {
        *(f"{value:.1f}" for value in table["predicted_ms"]),
        *(f"{value:.3f}" for value in table["predicted_ratio"]),
    }


def published() -> set[str]:
    """Every number of the published scores: of models, tokens, shots and accuracies."""
    table = scores.published_scores()
    texts = " ".join(str(value) for name in ("model", "params", "train_tokens", "shots") for value in table[name])
    guesses = {f"{100 * guess:.0f}" for guess in scores.RANDOM_GUESS.values()}
    return {*NUMBER.findall(re.sub("[-()]", " ", texts)), *(f"{value:.1f}" for value in table["value"]), *guesses}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_numbers_of_markdown_cells_are_cited_or_definitions(chapter: str) -> None:
    (source,) = [one.source for one in read_book(ROOT).chapters if one.name == chapter]
    for cell in nbformat.read(source, as_version=4).cells:
        if cell.cell_type != "markdown":
            continue
        text = re.sub(r"(?s)```.*?```|\$\$.*?\$\$|\$[^$]*\$", "", cell.source)
        for paragraph in re.split(r"\n\n|\n(?=[|-])", text):
            if not re.search(r"@(?!fig-|tbl-)[a-z]", paragraph):
                assert set(NUMBER.findall(paragraph)) <= DEFINITIONS, paragraph


SAME_IN_ALL = re.compile(
    # How it was set up, and how steps and seeds are numbered.
    r".*\.(schema|seed|steps|step|round|micro_batch|count|n_heads)|.*\.config\..*|metrics\.lr"
    r"|.*\.(device_count|host_count|concurrent_runs|versions|n-shot|random_guess)(\..*)?"
    # In no chapter, and zero.
    r"|data\.results\.domains\.\w+\.(validation\.(documents|text_bytes)|removed\.contaminated)"
)


def test_the_changed_records_differ_in_every_number_of_every_kind(editions: dict[str, Edition]) -> None:
    plain, others, models = (record_numbers(editions[name].records_dir) for name in ("plain", "others", "models"))
    assert {field.partition(".")[0] for field in plain} == set(FILES)
    assert plain.keys() == others.keys()
    same = [field for field in plain if sorted(plain[field]) == sorted(others[field]) == sorted(models[field])]
    assert [field for field in same if not SAME_IN_ALL.fullmatch(field)] == []


def record_numbers(records_dir: Path) -> dict[str, list[float]]:
    """Every number in the records, by kind of record and field: 'train.final.validation_loss', 'metrics.loss'."""
    found: dict[str, list[float]] = defaultdict(list)

    def collect(value: object, field: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f"{field}.{key}")
        elif isinstance(value, list):
            for inner in value:
                collect(inner, field)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[field].append(value)

    for path in sorted(records_dir.rglob("*.json")):
        values = json.loads(path.read_text())
        collect(values, values.get("kind", path.stem))
    for path in sorted(records_dir.rglob("*.parquet")):
        table = pd.read_parquet(path)
        for column in table.select_dtypes("number"):
            found[f"{path.stem}.{column}"] += table[column].tolist()
    return found


def test_every_point_of_the_interactive_chart_follows_the_records(editions: dict[str, Edition]) -> None:
    plain, others, models = (
        chart_of(editions[name].displays("index")["index 4"]) for name in ("plain", "others", "models")
    )
    assert [panel["title"] for panel in plain["panels"]] == [panel["title"] for panel in others["panels"]]
    for panels in zip(plain["panels"], others["panels"], models["panels"], strict=True):
        for points in zip(*(panel["points"] for panel in panels), strict=True):
            assert len({point["y"] for point in points}) > 1
            facts = [dict(point["facts"]) for point in points]
            same = {name for name in facts[0] if len({each[name] for each in facts}) == 1}
            assert same <= {"device", "width", "micro-batch", "seed", "record", "so"}


def chart_of(text: str) -> dict[str, Any]:
    (data,) = re.findall(r"(?s)```\{=html\}\n(.*?)\n```", text)
    return json.loads(data)


def test_every_number_and_figure_of_scaling_follows_a_ladder_with_branches(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    editions = []
    ladders = (LADDER, LADDER_LAW, 0.005, DEFAULT), (OTHER_LADDER, OTHER_LADDER_LAW, 0.027, OTHER)
    chapter = tmp_path / "chapters" / "scaling.ipynb"
    assert chapter.read_text().count("refits = 200") == 1
    for name, (sizes, law, noise, measured) in zip(("one", "other"), ladders, strict=True):
        write_ladder_records(tmp_path / name, sizes=sizes, law=law, noise=noise, measured=measured)
        refits = {"refits = 200": f"refits = {7 if name == 'one' else 8}"}
        editions.append(shown(chapter, tmp_path, tmp_path / name, refits))
    labels = {display.label for display in editions[0]}
    assert {f"tbl-{name}" for name in LADDER_TABLES} | {"fig-panels", "fig-extrapolation"} <= labels
    for before, after in zip(*editions, strict=True):
        assert before.label == after.label
        numbers, others = numbers_in(before.text), numbers_in(after.text)
        same = {numbers[index] for index in unmoved(numbers, others)}
        small = {number for number in same if re.fullmatch(r"\d{1,2},?", number)}
        assert same - small <= CONSTANTS, f"typed by hand? {prose(before.text)[:300]}"
        if before.label.startswith("fig-"):
            assert before.text != after.text


LADDER_TABLES = (
    "law", "multipliers", "gap-by-budget", "held-out", "larger-parameters", "extrapolation", "by-flops",
)  # fmt: skip
