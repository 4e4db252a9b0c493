from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fp8lab import tokenizer
from fp8lab.data import TokenDataset
from fp8lab.data.shards import MANIFEST, TOKENIZER, read_manifest, verify
from fp8lab.errors import UserError


@pytest.fixture
def folder(write_dataset: Callable) -> tuple[object, Path]:
    mixture, data_dir = write_dataset({"prose": [np.arange(300), np.arange(300, 500)], "code": [np.arange(200)]})
    TokenDataset.open(mixture, data_dir)  # sound as written
    return mixture, data_dir / mixture.name


def refused(folder: tuple[object, Path], message: str) -> None:
    mixture, path = folder
    with pytest.raises(UserError, match=message) as error:
        TokenDataset.open(mixture, path.parent)
    assert "\n" not in str(error.value)


def test_one_flipped_bit_is_refused_by_the_shards_name(folder: tuple[object, Path]) -> None:
    shard = folder[1] / "prose-train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[17] ^= 0b100
    shard.write_bytes(content)
    refused(folder, r"prose-train-00001\.bin: shard is damaged")


def test_a_truncated_shard_is_refused_by_name(folder: tuple[object, Path]) -> None:
    shard = folder[1] / "code-train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    refused(folder, r"code-train-00000\.bin: shard has 398 bytes, the manifest says 400")


def test_a_missing_shard_is_refused_by_name(folder: tuple[object, Path]) -> None:
    (folder[1] / "code-validation-00000.bin").unlink()
    refused(folder, r"code-validation-00000\.bin: shard is missing")


def test_a_manifest_of_another_tokenizer_is_refused(folder: tuple[object, Path]) -> None:
    other = tokenizer.train(["other text of another kind " * 40], 264, "other")
    (folder[1] / TOKENIZER).write_bytes(tokenizer.ranks_text(other))
    refused(folder, r"tokenizer\.tiktoken: another tokenizer")


def test_a_tokenizer_that_is_damaged_or_missing_is_refused_by_name(folder: tuple[object, Path]) -> None:
    ranks = folder[1] / TOKENIZER
    swapped = ranks.read_bytes().splitlines(keepends=True)
    swapped[-2:] = reversed(swapped[-2:])  # still loads, as the same tokenizer
    ranks.write_bytes(b"".join(swapped))
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken: another tokenizer or a damaged one"):
        verify(folder[1], read_manifest(folder[1]))
    refused(folder, r"tokenizer\.tiktoken: another tokenizer or a damaged one")
    ranks.unlink()
    refused(folder, r"tokenizer\.tiktoken: tokenizer is missing")


def test_a_mixture_with_another_tokenizer_or_source_is_refused(
    folder: tuple[object, Path], mixture_of: Callable
) -> None:
    mixture = folder[0]
    domains = {name: domain.model_dump() for name, domain in mixture.domains.items()}
    with pytest.raises(UserError, match="another version of mixture 'small' or with another tokenizer"):
        TokenDataset.open(mixture_of(domains=domains, tokenizer="gpt2"), folder[1].parent)


def test_a_truncated_manifest_is_refused_by_name(folder: tuple[object, Path]) -> None:
    manifest = folder[1] / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-40])
    refused(folder, r"manifest\.json: truncated or not JSON")


def test_a_manifest_cannot_point_out_of_its_folder(folder: tuple[object, Path]) -> None:
    manifest = folder[1] / MANIFEST
    values = json.loads(manifest.read_text())
    values["domains"]["code"]["train"]["shards"][0]["file"] = "../../secret.bin"
    manifest.write_text(json.dumps(values))
    refused(folder, r"manifest\.json: domains\.code\.train\.shards\.0\.file")


def test_no_data_set_says_how_to_make_one(folder: tuple[object, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp8lab data build"):
        TokenDataset.open(folder[0], tmp_path / "elsewhere")


def test_the_data_sets_hash_follows_its_tokens(write_dataset: Callable) -> None:
    hashes = [TokenDataset.open(*write_dataset({"only": [np.arange(start, start + 50)]})).sha256 for start in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
