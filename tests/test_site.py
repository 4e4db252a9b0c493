"""The published article, rendered from small records and opened in a browser.

Every page at a desktop's and a telephone's width: nothing overflows, nothing raw, no dead link. The
second site comes from other records, and the numbers that a reader sees must have changed with them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

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
    write_demo_records,
    write_ladder_records,
    write_run,
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
    write_speed_records(records_dir, measured=measured)
    write_variance_records(records_dir, sizes[0], measured=measured)
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
    images = browser.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
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


FROM_RECORDS = ("index", "approach", "data", "stability", "scaling", "throughput", "benchmarks", "reproduce")
NUMBER = re.compile(r"(?<![\w.#/@-])[+−-]?\d[\d,]*(?:\.\d+)?(?:e\d+)?[%kMBT×]?(?!\w)")
COUNT = re.compile(r"\d{1,2}")
CONSTANTS = {
    *("125M", "350M", "1.5B", "1024", "1024,", "2048", "2048,"),  # names of the timed settings, which both sites share
    "1.000",  # BF16 relative to itself
    "95%",  # level of an interval
    *("0.005", "0.01"),  # half-width and margin that claims are held against
    *("1%", "0.01%"),  # limits of underflow and saturation
    *("25%", "50%"),  # guessing among four and two choices
    *("0.076", "4%", "200", "1.40"),  # published, cited beside them
    *("2026", "3.11", "2.13"),  # year, and versions of Python and torch
}
NOT_FROM_RECORDS = re.compile(r"\{#tbl-(?:planned|bound|published)\}|^At 1\.5B the blocks|^Four things are often said")


def displayed(chapter: Path) -> list[str]:
    """What the code cells of an executed chapter show, without pictures and tags."""
    cells = json.loads(chapter.read_text())["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    texts = ["".join(output["data"]["text/markdown"]) for output in outputs if "data" in output]
    return [re.sub(r"<[^>]*>|data:image[^)]*", " ", text) for text in texts]


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


def test_measurements_on_a_gpu_take_the_demos_place(tmp_path: Path) -> None:
    records_dir = make_project(tmp_path)
    for recipe, seed in itertools.product(("bf16", "fused"), (1, 2)):
        for model in SIZES:
            write_run(records_dir, "ladder-h200", model, recipe, seed=seed, device_name="NVIDIA H200")
    keep_chapters(tmp_path, "index", "stability", "scaling")
    execute_stale_chapters(tmp_path, records_dir)
    for name in ("index", "stability", "scaling"):
        text = "\n".join(displayed(tmp_path / "build" / "executed" / f"{name}.ipynb"))
        assert "Measured on NVIDIA H200" in text
        assert not re.search("toy scale|`rowwise", text, re.IGNORECASE)


def test_every_number_and_figure_of_scaling_follows_a_ladder_with_branches(tmp_path: Path) -> None:
    executed = []
    ladders = (LADDER, LADDER_LAW, 0.005, DEFAULT), (OTHER_LADDER, OTHER_LADDER_LAW, 0.025, OTHER)
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
    path = records_dir / "demo" / os.listdir(records_dir / "demo")[0] / "record.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(Exception, match=r"stability\.ipynb: .*record\.json: truncated"):
        execute_stale_chapters(tmp_path, records_dir)


def test_without_records_the_article_says_which_command_makes_them(tmp_path: Path, without_quarto: None) -> None:
    records_dir = make_project(tmp_path)
    shutil.rmtree(records_dir)
    keep_chapters(tmp_path, "index", "data", "stability", "scaling", "throughput", "benchmarks", "reproduce")
    index = publish(tmp_path, records_dir, tmp_path / "_site")
    for page in (
        "index",
        *(f"chapters/{name}" for name in ("data", "stability", "scaling", "benchmarks", "reproduce")),
    ):
        assert "fp8lab run runs/plans/demo.yaml" in (index.parent / f"{page}.html").read_text(), page
    assert "runs/plans/speed-h200.yaml" in (index.parent / "chapters" / "throughput.html").read_text()
