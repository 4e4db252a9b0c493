"""Small corpora, and data sets written straight to disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import yaml

from fp8lab import tokenizer
from fp8lab.data import MixtureConfig, load_mixture
from fp8lab.data.shards import (
    TOKENIZER,
    DomainManifest,
    Manifest,
    Removed,
    ShardWriter,
    SplitManifest,
    TokenizerManifest,
    write_manifest,
)

WORDS = [hashlib.sha256(str(n).encode()).hexdigest()[: 3 + n % 6] for n in range(800)]


def sentence(seed: str, words: int = 60) -> str:
    """A document of its own: words drawn by a seeded rule."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "\n"


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two domains, each with two training files and a validation file of distinct documents."""
    folder = tmp_path / "corpus"
    for domain in ("prose", "code"):
        for shard in range(2):
            write_jsonl(folder / domain / f"{shard:02d}.jsonl", [sentence(f"{domain}{shard}{n}") for n in range(40)])
        write_jsonl(folder / domain / "val.jsonl", [sentence(f"{domain}-val{n}") for n in range(8)])
    return folder


@pytest.fixture
def mixture_of(tmp_path: Path) -> Callable[..., MixtureConfig]:
    """A mixture of `corpus`; keywords replace its fields."""

    def make(**fields: object) -> MixtureConfig:
        domains = {
            name: {
                "weight": weight,
                "source": {
                    "kind": "jsonl",
                    "train": [f"{name}/*.jsonl*"],
                    "validation": [f"{name}/val.jsonl*"],
                    "licence": "CC0",
                },
            }
            for name, weight in (("prose", 0.75), ("code", 0.25))
        }
        values = {
            "name": "small",
            "description": "test",
            "tokenizer": {"vocab_size": 512},
            "decontaminate": False,
            "domains": domains,
        } | fields
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return load_mixture(path)

    return make


@pytest.fixture(scope="session")
def encoding() -> tiktoken.Encoding:
    return tokenizer.train([sentence(str(n)) for n in range(200)], 512, "small")


@pytest.fixture
def write_dataset(
    tmp_path: Path, mixture_of: Callable[..., MixtureConfig], encoding: tiktoken.Encoding
) -> Callable[..., tuple[MixtureConfig, Path]]:
    """Write shards of given tokens and the manifest that belongs to them."""

    def write(
        train: dict[str, Sequence[np.ndarray]],
        weights: dict[str, float] | None = None,
        validation: np.ndarray | None = None,
    ) -> tuple[MixtureConfig, Path]:
        data_dir = tmp_path / "data"
        folder = data_dir / "small"
        folder.mkdir(parents=True, exist_ok=True)
        weights = weights or {name: 1 / len(train) for name in train}
        source = {"kind": "jsonl", "train": ["x"], "licence": "CC0"}
        mixture = mixture_of(domains={n: {"weight": w, "source": source} for n, w in weights.items()})
        domains = {}
        for name, shards in train.items():
            writers = {}
            for split, arrays in (
                ("train", shards),
                ("validation", [np.arange(100) if validation is None else validation]),
            ):
                writer = writers[split] = ShardWriter(folder, f"{name}-{split}", SplitManifest())
                for array in arrays:
                    writer.add([array], 0)
                    writer.close_shard()
            domains[name] = DomainManifest(
                source=source,
                removed=Removed(),
                train=writers["train"].written,
                validation=writers["validation"].written,
            )
        (folder / TOKENIZER).write_bytes(tokenizer.ranks_text(encoding))
        write_manifest(
            folder,
            Manifest(
                mixture="small",
                content_sha256=mixture.content_sha256,
                tokenizer=TokenizerManifest(sha256=tokenizer.sha256(encoding), vocab_size=encoding.n_vocab),
                decontamination=None,
                domains=domains,
            ),
        )
        return mixture, data_dir

    return write
