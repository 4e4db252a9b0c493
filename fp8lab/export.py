"""A trained model in the ecosystem's own form: `transformers` opens it with no code of ours.

Our GPT is transformers' Qwen3 with as many key-value heads as heads. The weights map one to one; ours keep q, k
and v in one matrix, and gate and up in another:

==================================  =================================================
ours (``blocks.N.``)                Qwen3 (``model.layers.N.``)
==================================  =================================================
``attention_norm``                  ``input_layernorm``
``attention.qkv`` (3 d, d)          ``self_attn.q_proj``, ``k_proj``, ``v_proj`` (d, d)
``attention.q_norm``, ``k_norm``    ``self_attn.q_norm``, ``k_norm``
``attention.output``                ``self_attn.o_proj``
``mlp_norm``                        ``post_attention_layernorm``
``mlp.gate_up`` (2 ff, d)           ``mlp.gate_proj``, ``mlp.up_proj`` (ff, d)
``mlp.down``                        ``mlp.down_proj``
==================================  =================================================

The embedding is ``model.embed_tokens``, tied to the head, and the last norm ``model.norm``. Weights stay FP32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken
from torch import Tensor

from fp8lab.config import ModelConfig
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.tokenizer import END_OF_TEXT, byte_of_printable
from fp8lab.training.checkpoint import load_model, trained_encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3Config


def export(run_folder: Path, out_dir: Path, *, data_dir: Path) -> None:
    """Write a finished run's model and tokenizer to `out_dir`.

    Args:
        run_folder: the run's checkpoints and final weights.
        out_dir: a new or empty folder.
        data_dir: built data sets; the run's mixture has the tokenizer.

    Raises:
        UserError: `out_dir` holds something, or the weights or the data set cannot be read.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: exists and is not an empty folder; name another")
    model, config = load_model(run_folder)
    write(model, trained_encoding(run_folder, config, data_dir), out_dir)


def write(model: GPT, encoding: tiktoken.Encoding, out_dir: Path) -> None:
    """Write `model` and `encoding` as ``model.safetensors``, ``config.json`` and the tokenizer's files."""
    from transformers import Qwen3ForCausalLM

    exported = Qwen3ForCausalLM(_qwen3_config(model.config, encoding.eot_token))
    exported.load_state_dict(_qwen3_weights(model))
    exported.save_pretrained(out_dir)
    fast_tokenizer(encoding, model.config.seq_len).save_pretrained(out_dir)


def fast_tokenizer(encoding: tiktoken.Encoding, seq_len: int) -> PreTrainedTokenizerFast:
    """The tokenizer that gives the same tokens as `encoding.encode_ordinary`: end-of-text in a text is plain text.

    tiktoken joins any two neighbours whose union has a rank, lowest rank first, so each way to split a token is a
    merge; a piece that is itself a token is taken whole.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # For `str.translate`: from each byte's Latin-1 character to the printable one that stands for it.
    printable = {byte: character for character, byte in byte_of_printable().items()}
    tokens = [encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [
        (token[:cut].decode("latin-1").translate(printable), token[cut:].decode("latin-1").translate(printable))
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {token.decode("latin-1").translate(printable): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary | {END_OF_TEXT: encoding.eot_token}, merges, ignore_merges=True))
    # GPT-2's split pattern is this pre-tokenizer's own.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=seq_len,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _qwen3_config(config: ModelConfig, eot_token: int) -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.seq_len,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=eot_token,
        eos_token_id=eot_token,
        dtype="float32",
    )


def _qwen3_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under Qwen3's names."""
    ours = {name: weight.cpu() for name, weight in model.state_dict().items()}
    weights = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "lm_head.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
    }
    same = {
        "attention_norm": "input_layernorm",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.down": "mlp.down_proj",
    }
    split = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for number in range(model.config.n_layers):
        block, layer = f"blocks.{number}", f"model.layers.{number}"
        for name, theirs in same.items():
            weights[f"{layer}.{theirs}.weight"] = ours[f"{block}.{name}.weight"]
        for name, parts in split.items():
            rows = ours[f"{block}.{name}.weight"].chunk(len(parts))
            weights |= {f"{layer}.{part}.weight": row for part, row in zip(parts, rows, strict=True)}
    return weights
