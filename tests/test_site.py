"""The published article, rendered from small records and opened in a browser.

Every page at a desktop's and a telephone's width: nothing overflows, nothing raw, no dead link. That its numbers follow
the records is for `test_numbers` to say.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from fp8lab.errors import UserError
from fp8lab.publish import execute_stale_chapters, publish, read_book
from tests.chapters import shown
from tests.fixtures import SAMPLE, SIZES, write_run
from tests.projects import ROOT, copy_sources, make_project

PAGES = [chapter.page for chapter in read_book(ROOT).chapters]
WIDTHS = (1280, 390)
RAW_MARKUP = re.compile(r"@(?:fig|tbl|sec|eq)-|:::|\{[#.=]|\]\(|\*\*|data:image|\bnan\b|<(?:div|table)")

# One worker renders the sites, and opens them.
pytestmark = pytest.mark.xdist_group("site")


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
    for natural, width_drawn, alternative in images:
        assert natural > 0
        # As wide as the text, and never cut off.
        assert 300 < width_drawn <= min(width, 600)
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


def chart_of(page: Path) -> dict[str, Any]:
    """The data of a page's interactive chart."""
    (data,) = re.findall(r'<script type="application/json" class="chart-data">(.*?)</script>', page.read_text())
    return json.loads(data)


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


PLACES = """
const boxes = arguments[0].map((mark) => mark.getBoundingClientRect());
return boxes.map((box) => [box.x + box.width / 2, box.y + box.height / 2]);
"""


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
    marks = browser.find_elements(By.CSS_SELECTOR, ".chart-point path")
    places = browser.execute_script(PLACES, marks)
    # Seeds of one size nearly coincide, and the pointer stands on whole pixels.
    apart = [min(math.dist(place, other) for other in places if other is not place) for place in places]
    loneliest = apart.index(max(apart))
    ActionChains(browser).move_to_element(marks[loneliest]).perform()
    assert chart_state(browser)["facts"].startswith(points[loneliest]["title"] + "\n")


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
    chapters = [chapter for chapter in read_book(ROOT).chapters if chapter.name in ("index", "stability", "scaling")]

    def text(records_dir: Path) -> str:
        return "\n".join(
            display.text for chapter in chapters for display in shown(chapter.source, tmp_path, records_dir)
        )

    records_dir = make_project(tmp_path)
    measured = text(records_dir)
    assert "Measured on NVIDIA H200" in measured
    assert not re.search("toy scale|demo's numbers", measured, re.IGNORECASE)
    for plan in ("pilot-h200", "early-h200", "variance-h200", "numerics-h200", "speed-h200", "speed-map"):
        shutil.rmtree(records_dir / plan)
    toy = text(records_dir)
    assert "Toy scale, CPU" in toy
    assert "No speed was measured" in toy
    assert "H200" not in re.sub(r"\S*(speed|variance)-h200\S*", "", toy)


def test_what_diverged_in_any_plan_is_named(tmp_path: Path) -> None:
    records_dir = make_project(tmp_path)
    folder = write_run(records_dir, "seeds-h200", SIZES[0], "fused", seed=2, device_name="NVIDIA H200")
    for recipe in ("bf16", "fused"):
        write_run(records_dir, "seeds-h200", SIZES[0], recipe, seed=1, device_name="NVIDIA H200")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"status": "diverged", "final": None}))
    text = "\n".join(display.text for display in shown(ROOT / "chapters" / "stability.ipynb", tmp_path, records_dir))
    assert f"`seeds-h200/{folder.name}` diverged." in text
    assert "No run diverged" not in text


def test_a_quoted_gap_is_one_of_the_linked_tables(site: Path, browser: webdriver.Chrome) -> None:
    open_page(browser, site / "index.html")
    quoted = re.findall(r"[+−]0\.\d{3,4}(?= nats/token)", visible_text(browser))
    open_page(browser, site / "chapters" / "stability.html")
    tables = [browser.find_element(By.CSS_SELECTOR, f"#{label}").text for label in ("tbl-gaps", "tbl-starts")]
    quoted_from = [[number for number in quoted if number in table] for table in tables]
    assert all(quoted_from)
    assert {number for found in quoted_from for number in found} == set(quoted)


def test_only_chapters_whose_inputs_changed_are_executed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = site.parent
    records_dir = root / "runs" / "records"
    assert execute_stale_chapters(root, records_dir) == []
    chapter = root / "chapters" / "motivation.ipynb"
    chapter.write_text(chapter.read_text().replace('"# Why', '"# Reasons why', 1))
    assert execute_stale_chapters(root, records_dir) == ["motivation"]


def test_a_chapter_that_fails_stops_the_article_by_name(tmp_path: Path) -> None:
    records_dir = make_project(tmp_path)
    keep_chapters(tmp_path, "stability", "scaling")
    path = records_dir / "pilot-h200" / os.listdir(records_dir / "pilot-h200")[0] / "record.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(UserError, match=r"stability\.ipynb.*: .*record\.json: truncated") as error:
        execute_stale_chapters(tmp_path, records_dir)
    # What stops several chapters is said once.
    assert "scaling.ipynb" in str(error.value)
    assert str(error.value).count("truncated") == 1


def test_without_records_the_article_says_which_command_makes_them(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    said = {
        chapter.name: "\n".join(display.text for display in shown(chapter.source, tmp_path, tmp_path / "nothing"))
        for chapter in read_book(tmp_path).chapters
    }
    for name in ("index", "data", "stability", "scaling", "benchmarks", "reproduce"):
        assert "fp8lab run runs/plans/demo.yaml" in said[name], name
    assert "runs/plans/speed-h200.yaml" in said["throughput"]
    assert "make reliability" in said["reliability"]
    assert "python -m fp8lab.benchmark overhead" in said["reliability"]
