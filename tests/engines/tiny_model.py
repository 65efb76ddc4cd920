"""A model directory of three small files, without weights: for engines that can make them up.

Both vLLM and SGLang take `--load-format dummy`. The tokenizer is a byte-level BPE whose words are
all strings of two and three letters, so that nearly every token reads as text and there are more of
them than bench.py's token ids.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

SPACE = "\u0120"  # how a byte-level tokenizer writes " "
END = "<|end|>"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write(folder: Path, architecture: str = "Llama") -> int:
    """Make the model in `folder`; returns the size of its vocabulary."""
    folder.mkdir(parents=True)
    tokenizer, size = bpe()
    for name, document in {
        "config": config(architecture, size),
        "tokenizer": tokenizer,
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "chat_template": CHAT,
            "clean_up_tokenization_spaces": False,
        },
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return size


def config(architecture: str, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def bpe() -> tuple[dict[str, Any], int]:
    pairs = list(product(ascii_lowercase, repeat=2))
    merges = [[a, b] for a, b in pairs]
    merges += [[a + b, c] for a, b in pairs for c in ascii_lowercase]
    merges += [[SPACE, "".join(m)] for m in merges]
    words = [END, *byte_letters(), *("".join(m) for m in merges)]
    model = {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": merges}
    end = {"id": 0, "content": END, "special": True, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False}  # fmt: skip
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": bytes_,
        "post_processor": None,
        "decoder": bytes_,
        "model": model,
    }, len(words)


def byte_letters() -> list[str]:
    """A letter for each byte, as GPT-2 has it: itself where it can be printed, else above 255."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(others))]
