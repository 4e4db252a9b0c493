"""How a chapter speaks: Markdown that both editions render alike."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pandas as pd
import pypandoc
import pytest
from IPython.display import Markdown

from fp8lab import article, units

Show = Callable[[pd.DataFrame], str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Show:
    """The Markdown that a chapter displays for a table."""

    def show(table: pd.DataFrame) -> str:
        displayed: list[Markdown] = []
        monkeypatch.setattr(article, "display", displayed.append)
        article.show_table(table, "name", "The caption.")
        (markdown,) = displayed
        return str(markdown.data)

    return show


def test_a_table_has_its_label_and_caption_and_escapes_its_cells(shown: Show) -> None:
    markdown = shown(pd.DataFrame({"what": ["a < b & c"], "value": [1.5]}))
    assert markdown.startswith("::: {#tbl-name}")
    assert "The caption." in markdown
    assert "a < b" not in markdown
    assert "a < b & c" in html.unescape(markdown)


def test_numbers_are_aligned_to_the_right_and_text_to_the_left(shown: Show) -> None:
    table = pd.DataFrame(
        {"name": ["1"], "loss": ["+0.0031"], "gap": ["−0.6%"], "score": ["41.0% ± 1.2%"], "recipe": ["fused"]}
    )
    cells = ElementTree.fromstring(re.search(r"<tbody>.*</tbody>", shown(table), re.DOTALL)[0]).iter("td")
    assert [cell.get("style") for cell in cells] == [
        f"text-align: {side}" for side in ("left", "right", "right", "right", "left")
    ]


def test_a_sentence_may_be_broken_into_lines_and_a_name_may_not(shown: Show) -> None:
    sentence = "The same command resumes from the newest whole checkpoint"
    table = shown(pd.DataFrame({"fault": ["kill -9"], "outcome": [sentence]}))
    assert f'<td class="sentence" style="text-align: left">{sentence}</td>' in table
    assert '<td style="text-align: left">kill -9</td>' in table


def test_a_missing_value_is_a_dash(shown: Show) -> None:
    assert ">–<" in shown(pd.DataFrame({"a": ["x"], "b": [float("nan")]}))


HOSTILE = (
    "*a* `b` <i>c</i> @fig-x",
    "~~~~\n# no heading\n~~~~~~",
    "::: {#x}\n$a_b$\n:::",
    "</code></pre><script>alert(1)</script>",
    "[x](javascript:alert(1)) ![y](http://evil.test/x.png) `z`{=html} [w]{onclick='alert(1)'}",
    "{{< include /etc/passwd >}}",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_literal_text_is_never_read_as_markup(text: str) -> None:
    markdown = article.literal(text)
    assert "{{<" not in markdown
    (paragraph,) = ElementTree.fromstring(f"<body>{pypandoc.convert_text(markdown, 'html5', format='markdown')}</body>")
    assert list(paragraph) == []
    assert (paragraph.text or "").split() == text.split()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_marks_code_and_nothing_else(shown: Show, text: str) -> None:
    page = pypandoc.convert_text(shown(pd.DataFrame({"what": [text]})), "html5", format="markdown")
    cell = ElementTree.fromstring(re.search(r"<td.*?</td>", page, re.DOTALL)[0])
    assert {element.tag for element in cell} <= {"code"}
    assert "".join(cell.itertext()).split() == text.replace("`", "").split()


@pytest.mark.parametrize("text", HOSTILE)
def test_verbatim_text_is_never_read_as_markup(text: str) -> None:
    page = pypandoc.convert_text(article.verbatim(text), "html5", format="markdown", extra_args=["--wrap=preserve"])
    assert "".join(ElementTree.fromstring(page).itertext()).strip() == text


@pytest.mark.parametrize(
    ("value", "text"), [(123_588_864, "124M"), (30e9, "30B"), (999, "999"), (1_500, "1.5k"), (2.5e12, "2.5T")]
)
def test_counts_have_the_suffix_that_suits(value: float, text: str) -> None:
    assert units.number(value) == text


def test_differences_carry_a_true_sign() -> None:
    assert (units.signed(0.00312), units.signed(-1.33, 1)) == ("+0.0031", "−1.3")
    assert (units.signed_percent(0.0057, 2), units.signed_percent(-0.065)) == ("+0.57%", "−6.5%")


def test_a_listing_reads_as_english() -> None:
    assert [units.listing(list("abc")[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
