"""The plainer edition: each executed chapter through pandoc into one page, with citations and navigation.

References to figures and tables (``@fig-name``), which Quarto numbers, become plain links here.
Nothing is fetched: no fonts, no scripts, mathematics as MathML, figures inside the pages.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import pypandoc

from fp8lab.publish.book import Book, Chapter
from fp8lab.publish.notebook_filter import prose
from fp8lab.records import write_atomically

KINDS = {"fig": "figure", "tbl": "table"}
LABEL = re.compile(r"\{#((?:fig|tbl)-[\w-]+)\}")


def render(book: Book, site_dir: Path) -> None:
    """Write one HTML page a chapter, and the style sheet and icon, into `site_dir`."""
    texts = {chapter: _markdown(chapter) for chapter in book.chapters}
    pages = {label: chapter for chapter, text in texts.items() for label in LABEL.findall(text)}
    site_dir.mkdir(parents=True, exist_ok=True)
    for asset in ("style.css", "favicon.svg"):
        shutil.copyfile(str(resources.files(__package__) / asset), site_dir / asset)
    # pandoc is a process of its own: threads are enough to use both cores.
    with ThreadPoolExecutor(2) as pool:
        bodies = pool.map(lambda chapter: _body(texts[chapter], chapter, pages, book.bibliography), book.chapters)
        for chapter, body in zip(book.chapters, bodies, strict=True):
            write_atomically(site_dir / chapter.page, _page(book, chapter, body).encode())
    print(f"article: wrote {len(book.chapters)} pages", flush=True)


def _markdown(chapter: Chapter) -> str:
    return "\n\n".join(prose(json.loads(chapter.executed.read_text(encoding="utf-8"))))


def _body(text: str, chapter: Chapter, pages: dict[str, Chapter], bibliography: Path) -> str:
    """The chapter's HTML: from Markdown to pandoc's tree, references resolved there, then out with citations."""
    tree = json.loads(pypandoc.convert_text(text, "json", format="markdown"))
    _link_references(tree["blocks"], chapter, pages)
    return pypandoc.convert_text(
        json.dumps(tree),
        "html5",
        format="json",
        extra_args=[
            "--citeproc",
            f"--bibliography={bibliography}",
            "--metadata=link-citations:true",
            "--mathml",
            "--wrap=preserve",
            "--syntax-highlighting=none",
        ],
    )


def _link_references(node: Any, chapter: Chapter, pages: dict[str, Chapter]) -> None:
    """In place: citations that name figures and tables become links, and links to notebooks become links to pages."""
    if isinstance(node, list):
        for child in node:
            _link_references(child, chapter, pages)
    elif isinstance(node, dict):
        if node.get("t") == "Cite" and all(citation["citationId"] in pages for citation in node["c"][0]):
            label = node["c"][0][0]["citationId"]
            node.update(_link(label, chapter, pages[label]))
        elif node.get("t") == "Link":
            target = node["c"][2]
            target[0] = re.sub(r"\.ipynb(?=$|#)", ".html", target[0])
        elif "c" in node:
            _link_references(node["c"], chapter, pages)


def _link(label: str, chapter: Chapter, target: Chapter) -> dict[str, Any]:
    kind = KINDS[label.partition("-")[0]]
    text = kind if target is chapter else f"{kind} in “{target.title}”"
    address = f"#{label}" if target is chapter else f"{_relative(target.page, chapter.page)}#{label}"
    return {"t": "Link", "c": [["", [], []], [{"t": "Str", "c": text}], [address, ""]]}


def _relative(page: str, origin: str) -> str:
    """Address of `page` as seen from the page `origin`."""
    return Path(os.path.relpath(page, Path(origin).parent)).as_posix()


def _page(book: Book, chapter: Chapter, body: str) -> str:
    template = Template((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    position = book.chapters.index(chapter)
    contents = "\n".join(_contents_entry(entry, chapter) for entry in book.chapters)
    return template.substitute(
        title=html.escape(chapter.title if position == 0 else f"{chapter.title} – {book.title}"),
        book=html.escape(book.title),
        description=html.escape(book.description),
        home=_relative("index.html", chapter.page),
        style=_relative("style.css", chapter.page),
        icon=_relative("favicon.svg", chapter.page),
        contents=contents,
        previous=_neighbour(book, chapter, position - 1, "previous", "← "),
        next=_neighbour(book, chapter, position + 1, "next", "", " →"),
        body=body,
    )


def _contents_entry(entry: Chapter, current: Chapter) -> str:
    marker = ' aria-current="page"' if entry is current else ""
    return f'<li><a href="{_relative(entry.page, current.page)}"{marker}>{html.escape(entry.title)}</a></li>'


def _neighbour(book: Book, current: Chapter, position: int, kind: str, before: str = "", after: str = "") -> str:
    if not 0 <= position < len(book.chapters):
        return "<span></span>"
    chapter = book.chapters[position]
    address = _relative(chapter.page, current.page)
    return f'<a rel="{kind[:4]}" href="{address}">{before}{html.escape(chapter.title)}{after}</a>'
