"""Real text that every installation of this project already holds, for the demo.

Four collections stand for the article's four domains. Nothing is imported or executed: sources and docstrings
are read as text (docstrings through `ast`), long descriptions from the packages' metadata.

Validation text comes from packages that training never sees. Licence headers and other boilerplate would still
make validation easy, so a paragraph of 80 characters or more that an earlier document had is dropped wherever
it comes again, validation last.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fp8lab.data.mixture import InstalledSource
from fp8lab.errors import UserError

_MATHEMATICS = re.compile(r":math:|\.\. math::|\$[^$\n]+\$")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
_C_SUFFIXES = {".h", ".c", ".hpp", ".cpp", ".cc", ".cuh"}
_FILE_BYTES = range(400, 150_000)  # shorter says nothing, longer is a table
_REPEATED_PARAGRAPH = 80


class Piece(NamedTuple):
    """A document and the package that it belongs to."""

    package: str
    origin: str
    text: str


def documents(source: InstalledSource) -> tuple[list[str], list[str]]:
    """Training and validation documents of a collection, in an order that depends on their names alone.

    Raises:
        UserError: a package to read is not installed.
    """
    gather = {"prose": _prose, "python": _python, "c": _c, "science": _science}[source.collection]
    # Ordered by hash, so that a cut at max_bytes takes a little of every package.
    pieces = sorted(gather(source), key=lambda piece: hashlib.sha256(piece.origin.encode()).digest())
    seen: set[bytes] = set()
    train = [piece.text for piece in pieces if piece.package not in source.held_out]
    validation = [piece.text for piece in pieces if piece.package in source.held_out]
    return _limited(train, source.max_bytes, seen), _limited(validation, source.max_validation_bytes, seen)


@functools.cache
def revision(source: InstalledSource) -> str:
    """Names the versions that the collection's text depends on."""
    versions = {"python": sys.version.split()[0]}
    if source.collection == "prose":
        versions |= {d.metadata["Name"]: d.version for d in metadata.distributions()}
    elif source.collection != "python":
        installed = _distributions_by_package()
        for package in {package.split("/")[0] for package in (*source.packages, *source.held_out)}:
            versions |= {name: metadata.version(name) for name in installed.get(package, [])}
    digest = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:16]
    return f"{len(versions)} installed versions, hash {digest}"


@functools.cache
def _distributions_by_package() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _limited(texts: list[str], max_bytes: int, seen: set[bytes]) -> list[str]:
    """Documents without repeated paragraphs, up to `max_bytes`."""
    kept, total = [], 0
    for text in texts:
        text = _without_repeats(text, seen)
        if len(text) < _FILE_BYTES.start:
            continue
        total += len(text.encode())
        if total > max_bytes:
            break
        kept.append(text)
    return kept


def _without_repeats(text: str, seen: set[bytes]) -> str:
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if len(paragraph) >= _REPEATED_PARAGRAPH:
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()[:16]
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept).strip() + "\n"


def _read(path: Path) -> str | None:
    """The file's text; None if it is not UTF-8 or of an unusual size."""
    if path.stat().st_size not in _FILE_BYTES:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _python(source: InstalledSource) -> Iterator[Piece]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if _NOT_LIBRARY & set(parts) or "-" in parts[0] or parts[0].startswith("_sysconfigdata"):
            continue
        if text := _read(path):
            yield Piece(parts[0].removesuffix(".py"), "/".join(parts), text)


def _package_folder(package: str) -> Path:
    """Where a package (or 'package/subfolder') is installed; nothing is imported to find out."""
    for entry in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path)):
        folder = Path(entry) / package
        if folder.is_dir():
            return folder
    raise UserError(f"source.packages: {package!r} is not installed; install the project with all its requirements")


def _package_files(source: InstalledSource, suffixes: set[str]) -> Iterator[tuple[str, str, str]]:
    for package in dict.fromkeys((*source.packages, *source.held_out)):
        folder = _package_folder(package)
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if path.suffix not in suffixes or "tests/" in f"{relative}/" or not path.is_file():
                continue
            if text := _read(path):
                yield package, f"{package}/{relative}", text


def _c(source: InstalledSource) -> Iterator[Piece]:
    for package, origin, text in _package_files(source, _C_SUFFIXES):
        yield Piece(package, origin, text)


def _science(source: InstalledSource) -> Iterator[Piece]:
    for package, origin, text in _package_files(source, {".py"}):
        if not _MATHEMATICS.search(text):
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node)
            if docstring and _MATHEMATICS.search(docstring):
                name = getattr(node, "name", "module")
                yield Piece(package, f"{origin}:{name}", f"{name}\n\n{docstring}")


def _prose(source: InstalledSource) -> Iterator[Piece]:
    for distribution in metadata.distributions():
        fields = distribution.metadata
        if text := str(fields.json.get("description", "")):
            yield Piece(fields["Name"].lower(), fields["Name"].lower(), _sentences(text))
    topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    for node in ast.walk(ast.parse(topics.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield Piece("pydoc_data", f"pydoc_data/{key.value!s}", str(value.value))


def _sentences(text: str) -> str:
    """Paragraphs that are mostly words: no badges, tables or link lists."""
    paragraphs = re.split(r"\n[ \t]*\n", text)
    return "\n\n".join(p for p in paragraphs if sum(c.isalpha() or c.isspace() for c in p) > 0.8 * len(p))
