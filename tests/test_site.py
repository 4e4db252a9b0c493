"""The published article, rendered from small records and opened in a browser.

Every page at a desktop's and a telephone's width: nothing overflows, nothing raw, no dead link. The
second site comes from other records, and the numbers that a reader sees must have changed with them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pandas as pd
import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from fp8lab.config import ModelConfig
from fp8lab.publish import execute_stale_chapters, publish, read_book
from tests.fixtures import (
    DEFAULT,
    LADDER,
    LADDER_LAW,
    OTHER,
    OTHER_LADDER,
    OTHER_LADDER_LAW,
    OTHER_SIZES,
    SAMPLE,
    SIZES,
    Measured,
    write_benchmark_records,
    write_demo_records,
    write_gpu_records,
    write_ladder_records,
    write_map_records,
    write_reliability_records,
    write_speed_records,
    write_variance_records,
)

ROOT = Path(__file__).parents[1]
PAGES = [chapter.page for chapter in read_book(ROOT).chapters]
WIDTHS = (1280, 390)
RAW_MARKUP = re.compile(r"@(?:fig|tbl|sec|eq)-|:::|\{[#.=]|\]\(|\*\*|data:image|\bnan\b|<(?:div|table)")

# One worker renders the sites, and opens them.
pytestmark = pytest.mark.xdist_group("site")


def make_project(root: Path, measured: Measured = DEFAULT, sizes: tuple[ModelConfig, ...] = SIZES) -> Path:
    """A project with the article's sources and small records; returns the folder of records."""
    for name in ("index.ipynb", "_quarto.yml", "references.bib"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "chapters", root / "chapters")
    for name in ("plans", "mixtures"):
        shutil.copytree(ROOT / "runs" / name, root / "runs" / name)
    records_dir = root / "runs" / "records"
    write_demo_records(records_dir, sizes=sizes, measured=measured)
    write_gpu_records(records_dir, sizes=sizes, measured=measured)
    write_speed_records(records_dir, trained=sizes[-1], measured=measured)
    write_map_records(records_dir, measured=measured)
    write_benchmark_records(records_dir, measured=measured)
    write_variance_records(records_dir, sizes[0], measured=measured)
    write_reliability_records(records_dir, measured=measured)
    return records_dir


def keep_chapters(root: Path, *names: str) -> None:
    """Leave only these chapters in the book."""
    config = yaml.safe_load((root / "_quarto.yml").read_text())
    config["book"]["chapters"] = [path for path in config["book"]["chapters"] if Path(path).stem in names]
    (root / "_quarto.yml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def without_quarto() -> Iterator[None]:
    """The pandoc edition, whether or not this machine has Quarto."""
    with pytest.MonkeyPatch.context() as patch:
        found = shutil.which
        patch.setattr(shutil, "which", lambda name, *rest: None if name == "quarto" else found(name, *rest))
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, without_quarto: None) -> Path:
    root = tmp_path_factory.mktemp("project")
    records_dir = make_project(root)
    return publish(root, records_dir, root / "_site").parent


@pytest.fixture(scope="module")
def other_site(tmp_path_factory: pytest.TempPathFactory, without_quarto: None) -> Path:
    root = tmp_path_factory.mktemp("other")
    records_dir = make_project(root, OTHER, OTHER_SIZES)
    return publish(root, records_dir, root / "_site").parent


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = shutil.which("chromedriver")
    assert driver, "the tests open the article in Debian's chromium: 'make browser' installs it"
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def open_page(browser: webdriver.Chrome, path: Path, width: int = 1280) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())


def visible_text(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body.innerText"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_and_is_whole(site: Path, browser: webdriver.Chrome, page: str, width: int) -> None:
    open_page(browser, site / page, width)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # A picture whose interactive twin stands in its place is hidden.
    images = browser.execute_script(
        "return [...document.images].filter(i => !i.hidden)"
        ".map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
    )
    for natural, shown, alternative in images:
        assert natural > 0
        # As wide as the text, and never cut off.
        assert 300 < shown <= min(width, 600)
        assert alternative.strip()
    assert RAW_MARKUP.findall(visible_text(browser)) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(site: Path, browser: webdriver.Chrome, page: str) -> None:
    open_page(browser, site / page)
    for address in browser.execute_script("return [...document.links].map(link => link.href)"):
        if urlparse(address).scheme != "file":
            assert address.startswith("https://"), address
            continue
        target, fragment = urldefrag(address)
        path = Path(unquote(urlparse(target).path))
        assert path.is_relative_to(site)
        assert path.is_file(), f"{page} links to {path}, which does not exist"
        if fragment:
            assert re.search(rf'\bid="{re.escape(unquote(fragment))}"', path.read_text()), f"{page}: no {address}"


def test_a_sample_is_shown_as_the_model_wrote_it(site: Path, browser: webdriver.Chrome) -> None:
    open_page(browser, site / "chapters/reproduce.html")
    assert SAMPLE in visible_text(browser)


def test_nothing_is_fetched(site: Path) -> None:
    for page in PAGES:
        loaded = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]*)"', (site / page).read_text()
        )
        assert loaded == [], page


def numbers_of(records_dir: Path) -> dict[str, list[float]]:
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


KINDS = {"train", "speed", "data", "benchmark", "eval", "metrics", "validation", "health", "steps", "test"}
SAME_IN_BOTH = re.compile(
    # How it was set up, and how steps and seeds are numbered.
    r".*\.(schema|seed|steps|step|round|micro_batch|count|n_heads)|.*\.config\..*|metrics\.lr"
    r"|.*\.(device_count|host_count|concurrent_runs|versions|n-shot|random_guess)(\..*)?"
    # In no chapter, and zero.
    r"|data\.results\.domains\.\w+\.(validation\.(documents|text_bytes)|removed\.contaminated)"
)


def test_the_other_records_differ_in_every_number_of_every_kind(site: Path, other_site: Path) -> None:
    before, after = (numbers_of(folder.parent / "runs" / "records") for folder in (site, other_site))
    assert {field.partition(".")[0] for field in before} == KINDS
    assert before.keys() == after.keys()
    same = [field for field in before if sorted(before[field]) == sorted(after[field])]
    assert [field for field in same if not SAME_IN_BOTH.fullmatch(field)] == []


FROM_RECORDS = (
    "index",
    "approach",
    "data",
    "stability",
    "scaling",
    "throughput",
    "benchmarks",
    "reliability",
    "reproduce",
)
NUMBER = re.compile(r"(?<![\w.#/@-])[+−-]?\d[\d,]*(?:\.\d+)?(?:e[-−]?\d+)?[%kMBT×]?(?!\w)")
COUNT = re.compile(r"\d{1,2},?")
CONSTANTS = {
    # Names, widths and batches of the timed settings, which both sites share.
    *("125M", "350M", "1.5B", "1024", "1024,", "2048", "2048,", "768", "1,024", "2,048", "65.5k", "32.8k"),
    "1.000",  # BF16 relative to itself
    "95%",  # level of an interval
    *("0.005", "0.01"),  # half-width and margin that claims are held against
    *("1%", "0.01%"),  # limits of underflow and saturation
    "-9",  # the signal of `kill -9`
    *("25%", "50%"),  # guessing among four and two choices
    *("0.076", "4%", "200", "1.40", "40%"),  # published, cited beside them
    *("250M", "5%", "10M", "0.80"),  # planned; the limits in the rules of the claims; goals
    *("2026", "3.11", "2.13"),  # year, and versions of Python and torch
}
NOT_FROM_RECORDS = re.compile(
    r"\{#tbl-(?:planned|bound|published|roofline)\}|^At 1\.5B the blocks|^Four things are often said"
    r"|^## From bytes and FLOPs|^On an H[12]00, predicted"
)


def displayed(chapter: Path) -> list[str]:
    """What the code cells of an executed chapter show, without pictures and tags."""
    cells = json.loads(chapter.read_text())["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    texts = ["".join(output["data"]["text/markdown"]) for output in outputs if "data" in output]
    return [re.sub(r"(?s)```\{=html\}.*|<[^>]*>|data:image[^)]*", " ", text) for text in texts]


@pytest.mark.parametrize("name", FROM_RECORDS)
def test_every_number_follows_the_records(site: Path, other_site: Path, name: str) -> None:
    executed = [folder.parent / "build" / "executed" / f"{name}.ipynb" for folder in (site, other_site)]
    followed = 0
    for before, after in zip(*map(displayed, executed), strict=True):
        if NOT_FROM_RECORDS.search(before):
            continue
        pairs = list(zip(NUMBER.findall(before), NUMBER.findall(after), strict=True))
        same = {number for number, other in pairs if number == other and not COUNT.fullmatch(number)}
        assert same <= CONSTANTS, f"typed by hand? {before[:300]}"
        followed += sum(number != other for number, other in pairs)
    assert followed > 0


@pytest.mark.parametrize("page", ["index", "data", "stability", "scaling", "throughput", "benchmarks", "reproduce"])
def test_every_figure_follows_the_records(site: Path, other_site: Path, browser: webdriver.Chrome, page: str) -> None:
    address = f"{page}.html" if page == "index" else f"chapters/{page}.html"
    figures = []
    for folder in (site, other_site):
        open_page(browser, folder / address)
        figures.append(browser.execute_script("return [...document.querySelectorAll('figure img')].map(i => i.src)"))
    assert len(figures[0]) == len(figures[1]) > 0
    for number, (before, after) in enumerate(zip(*figures, strict=True), start=1):
        assert before != after, f"figure {number} of {page} did not change with the records"


def chart_of(page: Path) -> dict[str, Any]:
    """The data of a page's interactive chart."""
    (data,) = re.findall(r'<script type="application/json" class="chart-data">(.*?)</script>', page.read_text())
    return json.loads(data)


def test_every_point_of_the_interactive_chart_follows_the_records(site: Path, other_site: Path) -> None:
    before, after = (chart_of(folder / "index.html") for folder in (site, other_site))
    assert [panel["title"] for panel in before["panels"]] == [panel["title"] for panel in after["panels"]]
    for panel, other_panel in zip(before["panels"], after["panels"], strict=True):
        for point, other in zip(panel["points"], other_panel["points"], strict=True):
            assert point["y"] != other["y"]
            facts, other_facts = dict(point["facts"]), dict(other["facts"])
            same = {name for name, value in facts.items() if value == other_facts[name]}
            assert same <= {"device", "width", "micro-batch", "seed", "record"}


def chart_state(browser: webdriver.Chrome) -> dict[str, Any]:
    """What a reader sees of the first page's chart."""
    return browser.execute_script(
        """
        const visible = [...document.querySelectorAll(".chart-point")].filter(point => point.style.display !== "none");
        return {
          marks: visible.length,
          facts: document.querySelector(".chart-facts").innerText,
          picture: !document.querySelector("#fig-switch img").hidden,
        };
        """
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_chart_tells_a_points_record_by_pointer_and_by_keyboard(
    site: Path, browser: webdriver.Chrome, width: int
) -> None:
    points = [point for panel in chart_of(site / "index.html")["panels"] for point in panel["points"]]
    open_page(browser, site / "index.html", width)
    assert chart_state(browser)["marks"] == len(points)
    panel = browser.find_element(By.CSS_SELECTOR, ".chart-panel svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    panel.send_keys(Keys.END)
    last = chart_state(browser)["facts"]
    panel.send_keys(Keys.HOME)
    first = chart_state(browser)["facts"]
    assert first != last
    for facts in (first, last):
        (point,) = [point for point in points if facts.startswith(point["title"] + "\n")]
        assert all(value in facts for _, value in point["facts"])
    mark = browser.find_elements(By.CSS_SELECTOR, ".chart-point path")[-1]
    ActionChains(browser).move_to_element(mark).perform()
    assert chart_state(browser)["facts"].startswith(points[-1]["title"])


def test_recipes_and_the_picture_can_be_switched(site: Path, browser: webdriver.Chrome) -> None:
    points = [point for panel in chart_of(site / "index.html")["panels"] for point in panel["points"]]
    open_page(browser, site / "index.html")
    (fused,) = [
        button for button in browser.find_elements(By.CSS_SELECTOR, ".chart-series button") if button.text == "fused"
    ]
    browser.execute_script("arguments[0].click()", fused)
    assert chart_state(browser)["marks"] == sum(point["series"] != "fused" for point in points)
    assert fused.get_attribute("aria-pressed") == "false"
    assert not chart_state(browser)["picture"]
    browser.execute_script("document.querySelector('.chart-picture').click()")
    assert chart_state(browser)["picture"]


def test_without_scripts_the_figure_is_its_picture(site: Path, browser: webdriver.Chrome) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, site / "index.html")
        assert browser.find_element(By.CSS_SELECTOR, "#fig-switch img").size["width"] > 300
        assert not browser.find_elements(By.CSS_SELECTOR, ".chart")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_measurements_on_a_gpu_take_the_demos_place(site: Path, tmp_path: Path) -> None:
    chapters = ("index", "stability", "scaling")

    def text(executed: Path) -> str:
        return "\n".join(text for name in chapters for text in displayed(executed / f"{name}.ipynb"))

    measured = text(site.parent / "build" / "executed")
    assert "Measured on NVIDIA H200" in measured
    assert not re.search("toy scale|demo's numbers", measured, re.IGNORECASE)
    records_dir = make_project(tmp_path)
    for plan in ("pilot-h200", "variance-h200", "speed-h200"):
        shutil.rmtree(records_dir / plan)
    keep_chapters(tmp_path, *chapters)
    execute_stale_chapters(tmp_path, records_dir)
    toy = text(tmp_path / "build" / "executed")
    assert "Toy scale, CPU" in toy
    assert "No speed was measured" in toy
    assert "H200" not in re.sub(r"\S*speed-h200\S*", "", toy)


def test_every_number_and_figure_of_scaling_follows_a_ladder_with_branches(tmp_path: Path) -> None:
    executed = []
    ladders = (LADDER, LADDER_LAW, 0.005, DEFAULT), (OTHER_LADDER, OTHER_LADDER_LAW, 0.027, OTHER)
    for name, (sizes, law, noise, measured) in zip(("one", "other"), ladders, strict=True):
        (tmp_path / name).mkdir()
        records_dir = make_project(tmp_path / name, measured)
        write_ladder_records(records_dir, sizes=sizes, law=law, noise=noise, measured=measured)
        keep_chapters(tmp_path / name, "scaling")
        chapter = tmp_path / name / "chapters" / "scaling.ipynb"
        assert chapter.read_text().count("refits = 200") == 1
        chapter.write_text(chapter.read_text().replace("refits = 200", f"refits = {7 if name == 'one' else 8}"))
        execute_stale_chapters(tmp_path / name, records_dir)
        executed.append(tmp_path / name / "build" / "executed" / "scaling.ipynb")
    known = CONSTANTS | {"250M"}  # a size that neither measured
    labels = {"law", "multipliers", "gap-by-budget", "held-out", "larger-parameters", "extrapolation", "by-flops"}
    for before, after in zip(*map(displayed, executed), strict=True):
        pairs = list(zip(NUMBER.findall(before), NUMBER.findall(after), strict=True))
        same = {number for number, other in pairs if number == other and not COUNT.fullmatch(number)}
        assert same <= known, f"typed by hand? {before[:300]}"
        labels -= set(re.findall(r"\{#tbl-([a-z-]+)\}", before))
    assert labels == set()
    pictures = [re.findall(r"data:image/svg\+xml;base64,[^)]*", path.read_text()) for path in executed]
    assert [len(found) for found in pictures] == [2, 2]
    assert not set(pictures[0]) & set(pictures[1])


def test_only_chapters_whose_inputs_changed_are_executed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = site.parent
    records_dir = root / "runs" / "records"
    assert execute_stale_chapters(root, records_dir) == []
    chapter = root / "chapters" / "motivation.ipynb"
    chapter.write_text(chapter.read_text().replace('"# Why', '"# Reasons why', 1))
    assert execute_stale_chapters(root, records_dir) == ["motivation"]


def test_a_chapter_that_fails_stops_the_article_by_name(tmp_path: Path) -> None:
    records_dir = make_project(tmp_path)
    keep_chapters(tmp_path, "stability")
    path = records_dir / "pilot-h200" / os.listdir(records_dir / "pilot-h200")[0] / "record.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(Exception, match=r"stability\.ipynb: .*record\.json: truncated"):
        execute_stale_chapters(tmp_path, records_dir)


def test_without_records_the_article_says_which_command_makes_them(tmp_path: Path, without_quarto: None) -> None:
    records_dir = make_project(tmp_path)
    shutil.rmtree(records_dir)
    keep_chapters(tmp_path, *(name for name in FROM_RECORDS if name != "approach"))
    index = publish(tmp_path, records_dir, tmp_path / "_site")
    for page in (
        "index",
        *(f"chapters/{name}" for name in ("data", "stability", "scaling", "benchmarks", "reproduce")),
    ):
        assert "fp8lab run runs/plans/demo.yaml" in (index.parent / f"{page}.html").read_text(), page
    assert "runs/plans/speed-h200.yaml" in (index.parent / "chapters" / "throughput.html").read_text()
    reliability = (index.parent / "chapters" / "reliability.html").read_text()
    assert "make reliability" in reliability
    assert "python -m fp8lab.benchmark overhead" in reliability
