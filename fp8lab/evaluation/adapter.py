"""Our GPT as a language model that lm-eval can question.

lm-eval asks two things: the log-likelihood of a continuation given a context (multiple choice, boolean,
LAMBADA), and of a whole text (perplexity). Both come down to scoring the last k tokens of a sequence.

What makes it fast without changing a score:

- Sequences are scored longest first, in batches of a fixed budget of tokens, so the first batch is the largest
  that will ever be held and padding is little. Padding stands on the right, where a causal model never looks.
- Questions that differ only in the last token ('A', 'B', 'C', 'D') share one forward pass.
- The head, by far the widest layer, computes logits only where a score is wanted, a slice at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import tiktoken
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from fp8lab.cpu import bf16_autocast
from fp8lab.model import GPT
from fp8lab.progress import Progress

PAD_MULTIPLE = 16
"""Lengths are padded to it: FP8 kernels want whole tiles of tokens."""
HEAD_ELEMENTS = 2**28
"""Logits held at once: 1 GiB in FP32."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The strings (None for a window of a long text), and the tokens of context and continuation."""


@dataclass
class _Sequence:
    """One row of a batch: its input tokens, and who wants scores of how many of its last predictions."""

    inputs: tuple[int, ...]
    wanted: list[tuple[int, list[int]]] = field(default_factory=list)
    """(index of the request, tokens it wants scored)."""

    @property
    def scored(self) -> int:
        return max(len(tokens) for _, tokens in self.wanted)


class GPTAdapter(TemplateLM):
    """`TemplateLM` over a `GPT` and its tokenizer.

    Text is encoded without special tokens: one written out in an item is plain text. End-of-text stands where
    there is no context, as it does before every training document.
    """

    def __init__(
        self,
        model: GPT,
        encoding: tiktoken.Encoding,
        *,
        bf16: bool = True,
        batch_tokens: int = 16_384,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode, on its device; converted to a recipe or not.
            encoding: the tokenizer it was trained with.
            bf16: GEMMs in BF16, as in training; else in the weights' dtype.
            batch_tokens: tokens of a batch, padding included; at least one sequence is always scored.
            on_progress: told after every batch; `step` counts requests of the kind being answered.
        """
        super().__init__()
        self.model = model
        self.encoding = encoding
        self.truncated: set[tuple[str, str]] = set()
        """(context, continuation) pairs that were longer than the model's context and lost their left end."""
        self._bf16 = bf16
        self._batch_tokens = batch_tokens
        self._on_progress = on_progress
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot_token

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once; one more is predicted."""
        return self.model.config.seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Tokens of `string`; `add_special_tokens` has no meaning here and is ignored."""
        return self.encoding.encode_ordinary(string)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError(
            "fp8lab scores likelihoods only; to run a generative task, `fp8lab export` the model and use "
            "`lm_eval --model hf`"
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood, in nats, of each whole text; each token once, with up to a full context."""
        owners: list[int] = []
        windows: list[Request] = []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(window)
                owners.append(index)
                windows.append((None, context, continuation))
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[owner] += loglikelihood
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """For each request, the continuation's log-likelihood in nats and whether it is the likeliest at every token.

        Raises:
            ValueError: a continuation without tokens.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        started, done = time.monotonic(), 0
        tokens_done = 0
        with tqdm(total=len(requests), desc="scoring", unit="item", mininterval=1, disable=disable_tqdm) as bar:
            for batch in self._batches(requests):
                for index, answer in self._score(batch):
                    answers[index] = answer
                    done += 1
                tokens_done += sum(len(sequence.inputs) for sequence in batch)
                bar.update(done - bar.n)
                if self._on_progress is not None:
                    elapsed = time.monotonic() - started
                    self._on_progress(
                        Progress(
                            stage="evaluating",
                            step=done,
                            steps=len(requests),
                            tokens_per_second=tokens_done / elapsed,
                            eta_seconds=elapsed / done * (len(requests) - done),
                        )
                    )
        return answers

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[_Sequence]]:
        """Sequences to score, longest first, those with the same input merged, within the budget of tokens."""
        sequences: dict[tuple[int, ...], _Sequence] = {}
        for index, (strings, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(f"nothing to score: the continuation of {strings} has no tokens of its own")
            whole = context + continuation
            if len(whole) > self.max_length + 1:
                if strings is not None:
                    self.truncated.add(strings)
                whole = whole[-(self.max_length + 1) :]
            inputs = tuple(whole[:-1])
            sequence = sequences.setdefault(inputs, _Sequence(inputs))
            sequence.wanted.append((index, continuation[-len(inputs) :]))
        ordered = sorted(sequences.values(), key=lambda sequence: (-len(sequence.inputs), sequence.inputs))
        start = 0
        while start < len(ordered):
            rows = max(1, self._batch_tokens // self._padded(len(ordered[start].inputs)))
            yield ordered[start : start + rows]
            start += rows

    def _padded(self, length: int) -> int:
        return min(self.max_length, -(-length // PAD_MULTIPLE) * PAD_MULTIPLE)

    @torch.no_grad()
    def _score(self, batch: Sequence[_Sequence]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(index, answer) of every request in the batch."""
        length = self._padded(len(batch[0].inputs))
        tokens = torch.full((len(batch), length), self.eot_token_id, dtype=torch.long)
        rows: list[int] = []
        columns: list[int] = []
        for row, sequence in enumerate(batch):
            end = len(sequence.inputs)
            tokens[row, :end] = torch.tensor(sequence.inputs)
            rows += [row] * sequence.scored
            columns += range(end - sequence.scored, end)
        # One (position, target) pair a wanted token; `starts` marks where each request's pairs begin.
        positions: list[int] = []
        targets: list[int] = []
        owners: list[tuple[int, int]] = []
        first = 0
        for sequence in batch:
            first += sequence.scored
            for index, continuation in sequence.wanted:
                owners.append((index, len(continuation)))
                positions += range(first - len(continuation), first)
                targets += continuation
        with self._precision():
            hidden = self.model.hidden(tokens.to(self._device))
            scored = hidden[torch.tensor(rows, device=self._device), torch.tensor(columns, device=self._device)]
            logprobs, greedy = self._token_scores(scored, positions, targets)
        start = 0
        for index, count in owners:
            yield index, (float(logprobs[start : start + count].sum()), bool(greedy[start : start + count].all()))
            start += count

    def _token_scores(self, hidden: Tensor, positions: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probability (nats, FP64) of each target token after its position, and whether it is the likeliest.

        Args:
            hidden: (n, d_model), a row a position.
            positions, targets: m pairs of a row of `hidden` and a token; rows ascend but for repeats.
        """
        wanted = torch.tensor(positions, device=self._device)
        target = torch.tensor(targets, device=self._device)
        logprobs = torch.empty(len(positions), dtype=torch.float64, device=self._device)
        greedy = torch.empty(len(positions), dtype=torch.bool, device=self._device)
        step = max(1, HEAD_ELEMENTS // self.model.config.vocab_size)
        for start in range(0, len(hidden), step):
            logits = self.model.logits(hidden[start : start + step]).float()
            here = ((wanted >= start) & (wanted < start + step)).nonzero().squeeze(1)
            row = wanted[here] - start
            chosen = logits[row, target[here]]
            logprobs[here] = (chosen - logits.logsumexp(-1)[row]).double()
            greedy[here] = logits.argmax(-1)[row] == target[here]
        return logprobs.cpu(), greedy.cpu()

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return bf16_autocast(self._device) if self._bf16 else contextlib.nullcontext()
