"""Duplicates and evaluation text: what is taken out before tokens are made.

*Exact duplicates* have the same SHA-256. *Near duplicates* share most of their 5-word shingles: MinHash with
locality-sensitive hashing (Broder 1997; the library is `datasketch`) at an estimated Jaccard similarity of 0.8,
as in Lee et al., "Deduplicating Training Data Makes Language Models Better" (2107.06499). Validation documents
come first, so a training document like one of them goes.

*Contaminated* documents share any 13 consecutive words (lower case, letters and digits only) with an evaluation
item, the rule of GPT-3 (2005.14165, appendix C), without its exception for frequent n-grams. Items shorter than 13
words cannot be matched.

Words become 64-bit hashes and n-grams polynomials of them, so a document costs a few array operations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fp8lab.data.shards import Decontamination
from fp8lab.data.sources import pieces
from fp8lab.errors import UserError

NGRAM = 13
SHINGLE = 5
NEAR_DUPLICATE_JACCARD = 0.8
PERMUTATIONS = 64

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHINGLES_AT_ONCE = 50_000


class _WordHashes(dict[str, int]):
    """Hashes of words seen lately."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1_000_000:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return value


_WORD_HASHES = _WordHashes()


def word_hashes(text: str) -> np.ndarray:
    """A hash for every word of `text`, lower case, letters and digits only: uint64, (words,)."""
    hashes = [
        np.fromiter(map(_WORD_HASHES.__getitem__, _WORD.findall(piece.lower())), dtype=np.uint64)
        for piece in pieces(text)
    ]
    return np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """A hash for every run of `n` words: uint64, (words - n + 1,); empty if there are fewer."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    total = words[:count].copy()
    for offset in range(1, n):
        total *= _MULTIPLIER
        total += words[offset : offset + count]
    # The low bits of a polynomial are weak; fold the high ones in.
    return total ^ (total >> np.uint64(31))


def content_hash(text: str) -> bytes:
    """First 16 bytes of the SHA-256 of the UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to a validation split of `fraction`; its content alone decides."""
    return int.from_bytes(content_hash(text)[:8], "big") < fraction * 2**64


def signature(words: np.ndarray) -> np.ndarray:
    """MinHash of a text's shingles, from its `word_hashes`: uint32, (PERMUTATIONS,)."""
    from datasketch import MinHash

    shingles = ngram_hashes(words, min(SHINGLE, max(len(words), 1)))
    minhash = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
    for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
        low_bits = shingles[start : start + _SHINGLES_AT_ONCE] & np.uint64(0xFFFFFFFF)
        minhash.update_batch(low_bits.tolist())
    return np.asarray(minhash.hashvalues, dtype=np.uint32)


@dataclass(frozen=True)
class Fingerprints:
    """Of one part's readable documents, by their number in the part."""

    documents: int
    """Documents in the part, unreadable ones included."""
    unreadable: int
    numbers: np.ndarray
    """(documents,) int64."""
    hashes: np.ndarray
    """(documents, 16) uint8: `content_hash`."""
    signatures: np.ndarray
    """(documents, PERMUTATIONS) uint32."""
    contaminated: np.ndarray
    """(documents,) bool."""


def fingerprints(documents: Iterable[str | None], items: EvaluationItems | None = None) -> Fingerprints:
    """Read a part once; unreadable and empty documents have no fingerprint."""
    numbers, hashes, signatures, contaminated = [], [], [], []
    count = unreadable = 0
    for number, text in enumerate(documents):
        count += 1
        if text is None:
            unreadable += 1
        elif text.strip():
            numbers.append(number)
            hashes.append(np.frombuffer(content_hash(text), dtype=np.uint8))
            words = word_hashes(text)
            signatures.append(signature(words))
            contaminated.append(items is not None and items.share_ngram(words))
    return Fingerprints(
        count,
        unreadable,
        np.array(numbers, dtype=np.int64),
        np.array(hashes, dtype=np.uint8).reshape(-1, 16),
        np.array(signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS),
        np.array(contaminated, dtype=bool),
    )


@dataclass(frozen=True)
class Exclusions:
    """Numbers of the documents of one part to leave out, each under one reason."""

    exact_duplicate: frozenset[int] = frozenset()
    near_duplicate: frozenset[int] = frozenset()
    contaminated: frozenset[int] = frozenset()

    def reason(self, number: int) -> str | None:
        """The field that holds a document's number; None for a document to keep."""
        return next((field.name for field in fields(self) if number in getattr(self, field.name)), None)


def find_exclusions(parts: list[Fingerprints]) -> list[Exclusions]:
    """Contaminated documents, and those that an earlier one repeats, in this part or a part before it."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=NEAR_DUPLICATE_JACCARD, num_perm=PERMUTATIONS)
    seen: set[bytes] = set()
    kept: list[np.ndarray] = []
    found = []
    for part in parts:
        exact, near, contaminated = set(), set(), set()
        columns = (part.numbers.tolist(), part.hashes, part.signatures, part.contaminated.tolist())
        for number, digest, values, leaked in zip(*columns, strict=True):
            if leaked:
                contaminated.add(number)
                continue
            if digest.tobytes() in seen:
                exact.add(number)
                continue
            seen.add(digest.tobytes())
            minhash = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, hashvalues=values, scheme="affine32")
            candidates = index.query(minhash)
            if any(np.mean(kept[candidate] == values) >= NEAR_DUPLICATE_JACCARD for candidate in candidates):
                near.add(number)
                continue
            index.insert(len(kept), minhash, check_duplication=False)
            kept.append(values)
        found.append(Exclusions(frozenset(exact), frozenset(near), frozenset(contaminated)))
    return found


class EvaluationItems:
    """The 13-grams of every evaluation item."""

    def __init__(self, ngrams: np.ndarray, report: Decontamination) -> None:
        """`ngrams`: distinct hashes, sorted."""
        self.ngrams = ngrams
        self.report = report
        # A bitmap of 2^27 bits answers nearly every look-up with one memory access.
        self._bitmap = np.zeros(1 << 24, dtype=np.uint8)
        slots = ngrams >> np.uint64(37)
        np.bitwise_or.at(self._bitmap, slots >> np.uint64(3), np.uint8(1) << (slots & np.uint64(7)).astype(np.uint8))

    @classmethod
    def read(cls, folder: Path) -> EvaluationItems:
        """Read every ``*.jsonl`` under `folder`; all strings of a row together are one item.

        Raises:
            UserError: the folder has no such file, or a line of one is not JSON.
        """
        files = sorted(folder.rglob("*.jsonl"))
        if not files:
            raise UserError(f"{folder}: no evaluation data there (*.jsonl)")
        items, grams, digest = 0, [], hashlib.sha256()
        for file in files:
            content = file.read_bytes()
            digest.update(content)
            for number, line in enumerate(content.splitlines(), 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    raise UserError(f"{file}: line {number} is not JSON") from None
                items += 1
                grams.append(ngram_hashes(word_hashes(" ".join(_strings(row))), NGRAM))
        distinct = np.unique(np.concatenate(grams))
        report = Decontamination(files=len(files), items=items, ngrams=len(distinct), sha256=digest.hexdigest())
        return cls(distinct, report)

    def contaminate(self, text: str) -> bool:
        """Whether `text` shares a 13-gram with an item."""
        return self.share_ngram(word_hashes(text))

    def share_ngram(self, words: np.ndarray) -> bool:
        """Whether a text of these `word_hashes` shares a 13-gram with an item."""
        hashes = ngram_hashes(words, NGRAM)
        slots = hashes >> np.uint64(37)
        bits = self._bitmap[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8)
        candidates = hashes[(bits & 1).astype(bool)]
        if not len(candidates):
            return False
        places = np.searchsorted(self.ngrams, candidates)
        return bool(np.any(self.ngrams[np.minimum(places, len(self.ngrams) - 1)] == candidates))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
