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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fp8lab.data.shards import Decontamination
from fp8lab.data.sources import pieces
from fp8lab.errors import UserError

if TYPE_CHECKING:
    from datasketch import MinHash

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


def word_hashes(text: str) -> Iterator[np.ndarray]:
    """A hash for every word of `text`, lower case, letters and digits only, a piece of the text at a time.

    Yields:
        uint64, (words,), never empty. Each array begins with the last NGRAM - 1 words of the one before, so that
        no n-gram is lost between them; memory does not grow with the text.
    """
    last = np.empty(0, dtype=np.uint64)
    for piece in pieces(text):
        new = np.fromiter(map(_WORD_HASHES.__getitem__, _WORD.findall(piece.lower())), dtype=np.uint64)
        if len(new):
            words = np.concatenate([last, new])
            yield words
            last = words[-(NGRAM - 1) :]


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
    digest = hashlib.sha256()
    for piece in pieces(text):
        digest.update(piece.encode("utf-8"))
    return digest.digest()[:16]


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to a validation split of `fraction`; its content alone decides."""
    return int.from_bytes(content_hash(text)[:8], "big") < fraction * 2**64


def _new_minhash(values: np.ndarray | None = None) -> MinHash:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, hashvalues=values, scheme="affine32")


def _add_shingles(minhash: MinHash, words: np.ndarray) -> None:
    """Add the shingles of `word_hashes`; what a piece repeats of the one before changes nothing."""
    shingles = ngram_hashes(words, min(SHINGLE, len(words)))
    for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
        low_bits = shingles[start : start + _SHINGLES_AT_ONCE] & np.uint64(0xFFFFFFFF)
        minhash.update_batch(low_bits.tolist())


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
    # Packed as they come: as objects they would take three times the memory.
    numbers, hashes, signatures, contaminated = bytearray(), bytearray(), bytearray(), bytearray()
    count = unreadable = 0
    for number, text in enumerate(documents):
        count += 1
        if text is None:
            unreadable += 1
        elif text and not text.isspace():
            minhash, leaked = _new_minhash(), False
            for words in word_hashes(text):
                _add_shingles(minhash, words)
                leaked = leaked or (items is not None and items.share_ngram(words))
            numbers += number.to_bytes(8, "little")
            hashes += content_hash(text)
            signatures += np.asarray(minhash.hashvalues, dtype=np.uint32).tobytes()
            contaminated.append(leaked)
    return Fingerprints(
        count,
        unreadable,
        np.frombuffer(numbers, dtype="<i8"),
        np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 16),
        np.frombuffer(signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS),
        np.frombuffer(contaminated, dtype=bool),
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
    contaminated = np.concatenate([part.contaminated for part in parts])
    exact = _repeats(np.concatenate([part.hashes for part in parts]), ~contaminated)
    near = _near_repeats(np.concatenate([part.signatures for part in parts]), ~contaminated & ~exact)
    ends = np.cumsum([len(part.numbers) for part in parts])[:-1]
    split = (np.split(found, ends) for found in (exact, near, contaminated))
    return [
        Exclusions(*(frozenset(part.numbers[found].tolist()) for found in of_part))
        for part, of_part in zip(parts, zip(*split, strict=True), strict=True)
    ]


def _repeats(hashes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Documents whose hash an earlier one has, both `among` those to look at: bool, (documents,)."""
    candidates = np.flatnonzero(among)
    _, first = np.unique(np.ascontiguousarray(hashes[candidates]).view("V16"), return_index=True)
    repeats = among.copy()
    repeats[candidates[first]] = False
    return repeats


def _near_repeats(signatures: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Documents that are a near duplicate of an earlier one that is kept: bool, (documents,)."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=NEAR_DUPLICATE_JACCARD, num_perm=PERMUTATIONS)
    near = np.zeros(len(signatures), dtype=bool)
    for number in _share_a_band(signatures, among, index.hashranges):
        minhash = _new_minhash(signatures[number])
        candidates = index.query(minhash)
        if any(np.mean(signatures[kept] == signatures[number]) >= NEAR_DUPLICATE_JACCARD for kept in candidates):
            near[number] = True
        else:
            index.insert(number, minhash, check_duplication=False)
    return near


def _share_a_band(signatures: np.ndarray, among: np.ndarray, bands: Sequence[tuple[int, int]]) -> list[int]:
    """The documents that the index could find, or find others by.

    Nearly all documents share no band with any other. The index, at kilobytes a document, need not hold them.
    """
    candidates = np.flatnonzero(among)
    shared = np.zeros(len(candidates), dtype=bool)
    for start, end in bands:
        keys = signatures[candidates, start].astype(np.uint64)
        for column in range(start + 1, end):
            keys = (keys * _MULTIPLIER) ^ signatures[candidates, column].astype(np.uint64)
        _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shared |= counts[which] > 1
    return candidates[shared].tolist()


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
        items, grams, digest = 0, [np.empty(0, dtype=np.uint64)], hashlib.sha256()
        for file in files:
            content = file.read_bytes()
            digest.update(content)
            for number, line in enumerate(content.splitlines(), 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    raise UserError(f"{file}: line {number} is not JSON") from None
                items += 1
                grams += [ngram_hashes(words, NGRAM) for words in word_hashes(" ".join(_strings(row)))]
        distinct = np.unique(np.concatenate(grams))
        report = Decontamination(files=len(files), items=items, ngrams=len(distinct), sha256=digest.hexdigest())
        return cls(distinct, report)

    def contaminate(self, text: str) -> bool:
        """Whether `text` shares a 13-gram with an item."""
        return any(map(self.share_ngram, word_hashes(text)))

    def share_ngram(self, words: np.ndarray) -> bool:
        """Whether words of these hashes share a 13-gram with an item."""
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
