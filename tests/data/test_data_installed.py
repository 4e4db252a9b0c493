from __future__ import annotations

from pathlib import Path

import pytest

from fp8lab.data import installed, load_mixture
from fp8lab.data.mixture import InstalledSource
from fp8lab.errors import UserError

DEMO = load_mixture(Path(__file__).parents[2] / "runs/mixtures/demo.yaml")


def source(domain: str, **changes: object) -> InstalledSource:
    found = DEMO.domains[domain].source
    assert isinstance(found, InstalledSource)
    return found.model_copy(update=changes)


@pytest.fixture(scope="module")
def prose() -> tuple[list[str], list[str]]:
    return installed.documents(source("prose"))


def test_prose_is_words(prose: tuple[list[str], list[str]]) -> None:
    train, validation = prose
    assert sum(map(len, train)) > 500_000
    assert sum(map(len, validation)) > 50_000
    for text in train[:50]:
        assert sum(char.isalpha() or char.isspace() for char in text) > 0.75 * len(text)


def test_no_long_paragraph_is_in_both_splits(prose: tuple[list[str], list[str]]) -> None:
    paragraphs = [
        {" ".join(p.split()) for text in texts for p in text.split("\n\n") if len(p) >= 80} for texts in prose
    ]
    assert paragraphs[0]
    assert not paragraphs[0] & paragraphs[1]


def test_the_same_installation_gives_the_same_text(prose: tuple[list[str], list[str]]) -> None:
    assert installed.documents(source("prose")) == prose


def test_held_out_modules_are_in_validation_only() -> None:
    train, validation = installed.documents(source("python", max_validation_bytes=10_000_000))
    mark = "class ArgumentParser("
    assert any(mark in text for text in validation)
    assert not any(mark in text for text in train)


def test_text_stops_at_its_budget() -> None:
    train, validation = installed.documents(source("c", max_bytes=50_000, max_validation_bytes=30_000))
    assert 0 < sum(len(text.encode()) for text in train) <= 50_000
    assert 0 < sum(len(text.encode()) for text in validation) <= 30_000


def test_science_has_mathematics_and_reads_it_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pretend"
    package.mkdir()
    for name in ("pretend", "held"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "module.py").write_text(
            'raise SystemExit("executed")\n'
            f'def area():\n    """The area of a circle in {name}, :math:`\\\\pi r^2`. {"Words of its own. " * 30}"""\n'
            f'def plain():\n    """No formula here. {"Other words again. " * 30}"""\n'
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    train, validation = installed.documents(source("science", packages=("pretend",), held_out=("held",)))
    assert [text.split("\n")[0] for text in train + validation] == ["area", "area"]
    assert "in pretend" in train[0]
    assert "in held" in validation[0]


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="'no_such_package' is not installed"):
        installed.documents(source("c", packages=("no_such_package",)))
