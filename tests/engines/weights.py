"""Weights for the tiny model, by chance, for engines that do not make them up themselves.

It runs in the engine's own virtual environment: `weights.py FOLDER gguf` for llama.cpp, `weights.py
FOLDER safetensors` for transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def gguf(folder: Path) -> None:
    """model.gguf: a Llama in half precision, its tokenizer and its chat template."""
    from gguf import GGUFWriter, TokenType  # type: ignore[import-not-found]

    config, tokenizer, chat = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "tokenizer", "tokenizer_config")
    )
    words = tokenizer["model"]["vocab"]
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(words))
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(words) - 1))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat["chat_template"])
    for name, shape in tensors(config):
        writer.add_tensor(name, some_weights(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """llama.cpp's names, and shapes as numpy has them."""
    hidden, inner, size = (config[f"{n}_size"] for n in ("hidden", "intermediate", "vocab"))
    keys = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (keys, hidden),
        "attn_v": (keys, hidden), "attn_output": (hidden, hidden), "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    whole = {"token_embd": (size, hidden), "output_norm": (hidden,), "output": (size, hidden)}
    return [(f"{name}.weight", shape) for name, shape in whole.items()] + [
        (f"blk.{n}.{name}.weight", shape)
        for n in range(config["num_hidden_layers"])
        for name, shape in block.items()
    ]


def some_weights(shape: tuple[int, ...]) -> Any:
    """By chance; norms, which have one dimension, are ones."""
    import numpy

    if len(shape) == 1:
        return numpy.ones(shape, numpy.float32)
    return (numpy.random.default_rng(0).standard_normal(shape) * 0.02).astype(numpy.float16)


def safetensors(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM  # type: ignore[import-not-found]

    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


if __name__ == "__main__":
    {"gguf": gguf, "safetensors": safetensors}[sys.argv[2]](Path(sys.argv[1]))
