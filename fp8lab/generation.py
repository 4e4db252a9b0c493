"""Text from a trained model."""

from __future__ import annotations

import tiktoken
import torch

from fp8lab.cpu import bf16_autocast
from fp8lab.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 1,
) -> str:
    """Continue `prompt`, under BF16 autocast.

    Args:
        model: weights as `fp8lab.training.checkpoint.load_model` returns them.
        encoding: the tokenizer it was trained with.
        prompt: text; special tokens in it are read as plain text. May be empty.
        max_tokens: tokens to write at most; ends earlier at the end-of-text token.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens; 0: among all.
        seed: the same seed writes the same text.

    Returns:
        The continuation, without the prompt.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    # A document begins after the end of the one before.
    tokens = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    written: list[int] = []
    for _ in range(max_tokens):
        context = torch.tensor([tokens[-model.config.seq_len :]], device=device)
        with bf16_autocast(device):
            hidden = model.hidden(context)[:, -1]
        # Rows beyond the tokenizer's are padding.
        logits = model.logits(hidden)[0, : encoding.n_vocab].float().cpu()
        token = _sample(logits, temperature, top_k, generator)
        if token == encoding.eot_token:
            break
        tokens.append(token)
        written.append(token)
    return encoding.decode(written)


def _sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        smallest_kept = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    # From the largest down and in FP64: a tiny temperature then divides towards -inf, never to inf or 0 / 0.
    scaled = (logits - logits.max()).double() / temperature
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
