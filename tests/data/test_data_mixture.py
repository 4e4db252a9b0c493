from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fp8lab.data import MixtureConfig, load_mixture
from fp8lab.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "runs/mixtures").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_mixtures_are_valid_and_named_after_their_files(path: Path) -> None:
    assert load_mixture(path).name == path.stem


def test_every_hub_source_is_pinned_to_a_commit() -> None:
    for domain in load_mixture(ROOT / "runs/mixtures/article.yaml").domains.values():
        assert len(domain.source.revision) == 40
        assert domain.source.licence


def test_the_article_builds_what_its_largest_run_draws() -> None:
    for domain in load_mixture(ROOT / "runs/mixtures/article.yaml").domains.values():
        assert domain.source.max_tokens >= domain.weight * 30e9


def test_the_local_text_is_the_same_in_either_vocabulary() -> None:
    ladder, gpt2 = (load_mixture(ROOT / f"runs/mixtures/{name}.yaml") for name in ("local", "local-gpt2"))
    assert ladder.domains == gpt2.domains
    assert gpt2.tokenizer == "gpt2" != ladder.tokenizer


def _demo(tmp_path: Path, change: Callable[[dict], None]) -> Path:
    values = yaml.safe_load((ROOT / "runs/mixtures/demo.yaml").read_text())
    change(values)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_weights_that_do_not_sum_are_refused_with_their_sum(tmp_path: Path) -> None:
    path = _demo(tmp_path, lambda values: values["domains"]["c"].update(weight=0.5))
    with pytest.raises(UserError, match=r"domains: weights must sum to 1 but sum to 1\.3"):
        load_mixture(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(colour="blue"), "colour: unknown field; accepted: name, description"),
        (lambda v: v.update(tokenizer={"vocab_size": 1000}), "vocab_size.*multiple of 16"),
        (lambda v: v["domains"]["c"]["source"].update(kind="web"), "kind|installed"),
        (lambda v: v["domains"]["c"]["source"].update(held_out=[]), "held_out"),
        (lambda v: v.update(domains={}), "domains"),
        (lambda v: v.update(name="../elsewhere"), "name"),
    ],
)
def test_a_mistake_is_refused_by_field(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_mixture(_demo(tmp_path, change))
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"'dmeo'.*article, demo"):
        load_mixture("dmeo")


def test_a_weight_changes_nothing_that_is_built_but_a_source_does(tmp_path: Path) -> None:
    original = load_mixture(ROOT / "runs/mixtures/demo.yaml")

    def shift(values: dict) -> None:
        values["domains"]["c"]["weight"] = 0.1
        values["domains"]["prose"]["weight"] = 0.35

    assert load_mixture(_demo(tmp_path, shift)).content_sha256 == original.content_sha256
    other = load_mixture(_demo(tmp_path, lambda v: v["domains"]["c"]["source"].update(max_bytes=99_999)))
    assert other.content_sha256 != original.content_sha256


def test_the_tokenizer_file_is_found_beside_the_mixture(
    mixture_of: Callable[..., MixtureConfig], tmp_path: Path
) -> None:
    mixture = mixture_of(tokenizer={"file": "t.tiktoken", "sha256": "0" * 64})
    assert mixture.tokenizer.file == tmp_path / "t.tiktoken"
