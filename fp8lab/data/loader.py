"""From shards to batches, without state.

The batch at step *s* is a pure function of (mixture, seed, s, global batch). Not of the number of GPUs, the
precision, or what was drawn before: so two runs that differ in precision see the same tokens in the same order,
a resumed run continues exactly, and eight GPUs see what one saw. Three pure maps make it so:

1. sequence -> domain. Sequence *g* of the whole run (step s holds g = s·B ... s·B + B - 1) belongs to the domain
   that a fixed periodic pattern gives. The pattern spreads each domain as evenly as its weight allows, so after
   any number of sequences every domain is less than one sequence from its share.
2. (domain, k) -> epoch and place. The k-th sequence of a domain with n windows is place k mod n of epoch k div n.
3. (domain, epoch, place) -> window. Each epoch visits the windows in a permutation keyed by (seed, domain,
   epoch), drawn from Philox's raw bits, which NumPy keeps stable between versions.

A domain's training tokens are one long row; window *i* is the seq_len + 1 tokens from i·seq_len. Inputs are all
but its last token, targets all but its first, so within an epoch each token is a target exactly once (but the
very first, and fewer than seq_len at the end).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from fp8lab import tokenizer
from fp8lab.data.mixture import MixtureConfig
from fp8lab.data.shards import TOKEN_DTYPE, TOKENIZER, Manifest, Shard, check_mixture, read_manifest, verify
from fp8lab.errors import UserError

REPEAT_WARNING_EPOCHS = 4
"""Up to about four passes, repeated data is close to fresh data (Muennighoff et al., 2305.16264)."""

_PATTERN_LENGTH = 10_000
"""Weights are met to one part in so many."""


class TokenRow:
    """Shards of one domain and split as one row of tokens, memory-mapped."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        # Seen as plain arrays: slicing a memmap itself takes longer than copying a window.
        self._maps = [np.asarray(np.memmap(folder / shard.file, dtype=TOKEN_DTYPE, mode="r")) for shard in shards]
        self._starts = list(itertools.accumulate(map(len, self._maps), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read_into(self, row: np.ndarray, start: int) -> None:
        """Fill `row` with the tokens from `start` on."""
        index = bisect.bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(row):
            offset = start + filled - self._starts[index]
            piece = self._maps[index][offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1


class TokenDataset:
    """A verified data set, opened for reading."""

    def __init__(
        self, folder: Path, manifest: Manifest, weights: dict[str, float], encoding: tiktoken.Encoding
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = weights
        """Share of the training tokens by domain."""
        self.encoding = encoding
        self.train = {name: TokenRow(folder, domain.train.shards) for name, domain in manifest.domains.items()}
        self._validation = {
            name: TokenRow(folder, domain.validation.shards) for name, domain in manifest.domains.items()
        }

    @classmethod
    def open(cls, mixture: MixtureConfig, data_dir: Path) -> TokenDataset:
        """Open ``<data_dir>/<mixture.name>`` after comparing its tokenizer and every shard with the manifest.

        Raises:
            UserError: there is no such data set, it was built from another mixture or tokenizer, or its tokenizer or a
                shard is missing, truncated or damaged; the message names the file.
        """
        folder = Path(data_dir) / mixture.name
        manifest = read_manifest(folder)
        check_mixture(folder, manifest, mixture)
        verify(folder, manifest)
        return cls(folder, manifest, mixture.weights, tokenizer.load(folder / TOKENIZER))

    @property
    def sha256(self) -> str:
        """Names the tokens; goes into every record."""
        return self.manifest.data_sha256

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.tokenizer.sha256

    @property
    def train_tokens(self) -> dict[str, int]:
        """Training tokens by domain."""
        return {name: domain.train.tokens for name, domain in self.manifest.domains.items()}

    def validation_windows(self, domain: str, seq_len: int, max_tokens: int) -> tuple[np.ndarray, int]:
        """The first windows of a domain's validation text.

        Returns:
            windows: (n, seq_len + 1) int64, with n·seq_len <= max_tokens predicted tokens.
            bytes: UTF-8 bytes that the predicted tokens stand for, so bits per byte = nats / ln 2 / bytes.

        Raises:
            UserError: the validation text, or max_tokens, is shorter than one window.
        """
        row = self._validation[domain]
        count = min(max_tokens // seq_len, (len(row) - 1) // seq_len)
        if count < 1:
            raise UserError(
                f"{self.folder}: domain {domain!r} has {len(row):,} validation tokens and validation_tokens is "
                f"{max_tokens:,}: less than one window of {seq_len:,}"
            )
        windows = np.empty((count, seq_len + 1), dtype=np.int64)
        for index in range(count):
            row.read_into(windows[index], index * seq_len)
        return windows, int(tokenizer.token_bytes(self.encoding)[windows[:, 1:]].sum())


class Loader:
    """Batches of training windows."""

    def __init__(self, dataset: TokenDataset, *, seq_len: int, seed: int, global_batch_sequences: int) -> None:
        """
        Raises:
            UserError: a domain's training text is shorter than one window.
        """
        self._dataset = dataset
        self._seq_len = seq_len
        self._seed = seed
        self._global_batch = global_batch_sequences
        self._domains = list(dataset.weights)
        self._windows = [(len(dataset.train[name]) - 1) // seq_len for name in self._domains]
        for name, windows in zip(self._domains, self._windows, strict=True):
            if windows < 1:
                raise UserError(
                    f"{dataset.folder}: domain {name!r} has {len(dataset.train[name]):,} training tokens, "
                    f"less than one window of {seq_len:,}"
                )
        self._pattern = domain_pattern(list(dataset.weights.values()))
        # before[g, d]: sequences of domain d among the pattern's first g.
        one_hot = self._pattern[:, None] == np.arange(len(self._domains))
        self._before = np.concatenate([np.zeros((1, len(self._domains)), int), np.cumsum(one_hot, axis=0)])
        self._warned: set[str] = set()
        # An epoch's permutation is kept while the domain is in it; a batch may straddle two epochs.
        self._permutation = functools.lru_cache(maxsize=2 * len(self._domains))(self._draw_permutation)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """This rank's rows of the global batch at `step`: (global_batch_sequences / world_size, seq_len + 1) int64.

        Raises:
            UserError: the global batch does not divide by the world size.
        """
        if self._global_batch % world_size:
            raise UserError(f"global batch of {self._global_batch} sequences does not divide by {world_size} devices")
        rows = self._global_batch // world_size
        first = step * self._global_batch + rank * rows
        batch = np.empty((rows, self._seq_len + 1), dtype=np.int64)
        for row, (domain, window) in enumerate(self._locate(np.arange(first, first + rows))):
            self._dataset.train[self._domains[domain]].read_into(batch[row], window * self._seq_len)
        self._warn_of_repeats(step + 1)
        return batch

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each domain's training text after `step` steps."""
        drawn = self._drawn(np.array(step * self._global_batch))
        return {
            name: int(count) / windows for name, count, windows in zip(self._domains, drawn, self._windows, strict=True)
        }

    def _drawn(self, sequences: np.ndarray) -> np.ndarray:
        """Sequences of each domain among the first so many: (..., domains) of `sequences` (...)."""
        periods, rest = np.divmod(sequences, len(self._pattern))
        return np.multiply.outer(periods, self._before[-1]) + self._before[rest]

    def _locate(self, sequences: np.ndarray) -> Iterator[tuple[int, int]]:
        """Domain and window of each of some sequences of the run.

        All at once, as far as it goes: this runs in a thread, and takes the interpreter from the one that trains.
        """
        domains = self._pattern[sequences % len(self._pattern)]
        before = np.take_along_axis(self._drawn(sequences), domains[:, None], axis=1)[:, 0]
        epochs, places = np.divmod(before, np.array(self._windows)[domains])
        for domain, epoch, place in zip(domains.tolist(), epochs.tolist(), places.tolist(), strict=True):
            yield domain, int(self._permutation(domain, epoch)[place])

    def _draw_permutation(self, domain: int, epoch: int) -> np.ndarray:
        key = hashlib.sha256(f"{self._seed}/{self._domains[domain]}/{epoch}".encode()).digest()[:16]
        bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(self._windows[domain])
        return np.argsort(bits, kind="stable")

    def _warn_of_repeats(self, step: int) -> None:
        for name, passes in self.epochs(step).items():
            if passes > REPEAT_WARNING_EPOCHS and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"domain {name!r}: more than {REPEAT_WARNING_EPOCHS} passes over its training text from step "
                    f"{step} on; repeated text is worth less than fresh text",
                    stacklevel=3,
                )


def check_tokenizer(dataset: TokenDataset, trained_with: str | None, where: Path) -> None:
    """Refuse a data set whose tokenizer is not the one that weights were trained with.

    Args:
        trained_with: its SHA-256; None where that was not kept, and so is taken at its word.
        where: the file that says so, for the message.

    Raises:
        UserError: it is another.
    """
    if trained_with is not None and trained_with != dataset.tokenizer_sha256:
        raise UserError(
            f"{where}: trained with tokenizer {trained_with[:12]}, but {dataset.folder} now has "
            f"{dataset.tokenizer_sha256[:12]}; build the data set that it was trained on"
        )


def domain_pattern(weights: list[float]) -> np.ndarray:
    """A period of domain indices, in which every prefix is within one sequence of every domain's share.

    R. Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980): among the domains that may go
    next without ever running ahead of their share, take the one whose deadline comes first. The deviation stays
    below 1 - 1/(2n - 2) sequences for n domains.
    """
    counts = _whole_counts(weights)
    period = sum(counts)
    # In units of 1 / denominator sequences, so that every comparison is exact.
    denominator = max(2 * len(counts) - 2, 2)
    used = [0] * len(counts)
    pattern = np.empty(period, dtype=np.int64)
    for index in range(period):
        allowed = [
            domain
            for domain, count in enumerate(counts)
            if denominator * (count * (index + 1) - used[domain] * period) >= period
        ]
        chosen = min(allowed, key=lambda domain: (denominator * (used[domain] + 1) - 1) / counts[domain])
        pattern[index] = chosen
        used[chosen] += 1
    return pattern


def _whole_counts(weights: list[float]) -> list[int]:
    """Weights as whole numbers with the smallest sum that meets them to 1 in `_PATTERN_LENGTH` (largest remainders)."""
    exact = [weight / sum(weights) * _PATTERN_LENGTH for weight in weights]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: _PATTERN_LENGTH - sum(counts)]:
        counts[index] += 1
    divisor = int(np.gcd.reduce(counts))
    return [count // divisor for count in counts]
