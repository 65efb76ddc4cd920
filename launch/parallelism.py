"""How many GPUs a launch needs: serve arguments merged with the engine's YAML, which wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from common.talk import die

# `--config` is what later versions call it; 1.1.0 knows only the long name, later ones know both.
CONFIG_FLAGS = ("--config", "--extra_llm_api_options")
SIZES = {
    "tensor_parallel_size": ("--tp_size", "--tensor_parallel_size"),
    "pipeline_parallel_size": ("--pp_size", "--pipeline_parallel_size"),
    "context_parallel_size": ("--cp_size", "--context_parallel_size"),
}
MOE_SIZES: dict[str, tuple[str, ...]] = {
    "moe_tensor_parallel_size": (),  # in the YAML only
    "moe_expert_parallel_size": ("--ep_size", "--moe_expert_parallel_size"),
    "moe_cluster_parallel_size": ("--cluster_size", "--moe_cluster_parallel_size"),
}
# trtllm-serve's options that take no value; after any other one comes its value.
SWITCHES = (
    "--trust_remote_code",
    "--fail_fast_on_attention_window_too_large",
    "--enable_chunked_prefill",  # of 1.2.1
    "--help",
)


@dataclass(frozen=True)
class World:
    """Tensor, pipeline and context parallel size; their product is the number of ranks."""

    tp: int
    pp: int
    cp: int

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        return f"{self.size} (tp {self.tp} x pp {self.pp} x cp {self.cp})"


def value_of(args: Sequence[str], *flags: str) -> str | None:
    """The last value given for any of a flag's names, as `--flag value` or `--flag=value`."""
    found = None
    for word, following in zip_longest(args, args[1:]):
        name, equals, value = word.partition("=")
        if name in flags:
            found = value if equals else following
    return found


def split_model(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model and the serve arguments. The model is the first word that is no flag's value."""
    i = 0
    while i < len(words):
        if not words[i].startswith("-"):
            return words[i], [*words[:i], *words[i + 1 :]]
        i += 1 if "=" in words[i] or words[i] in SWITCHES else 2
    return None, list(words)


def rename_config(args: Sequence[str]) -> list[str]:
    """`--config X` as 1.1.0 calls it."""
    old, new = CONFIG_FLAGS
    renamed = (new + word[len(old) :] if word.split("=")[0] == old else word for word in args)
    return list(renamed)


def read_config(path: str) -> dict[str, Any]:
    """The engine's YAML. Failure with the parser's words where it is not a mapping."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        die(f"cannot read the config file {path}: {error.strerror}")
    except RecursionError:
        die(f"the config file {path} is not YAML: nested too deeply")
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # a date that is none
        die(f"the config file {path} is not YAML: {' '.join(str(error).split())[:300]}")
    if not isinstance(config, dict | None):
        die(f"the config file {path} is not a mapping of settings")
    return config or {}


def is_count(text: str) -> bool:
    """Whether a text is a whole number from 1 that int() takes."""
    return text.isascii() and text.isdigit() and len(text) < 1000 and int(text) > 0


def merged(args: Sequence[str]) -> dict[str, Any]:
    """The settings as the engine will see them: sizes given by flags, and over them the YAML."""
    path = value_of(args, *CONFIG_FLAGS)
    config = read_config(path) if path is not None else {}
    given = {key: value_of(args, *flags) for key, flags in (SIZES | MOE_SIZES).items()}
    flags = {key: size for key, size in given.items() if size}
    return flags | {k: v for k, v in config.items() if v is not None or k not in flags}


def size_of(settings: Mapping[str, Any], key: str) -> int:
    """A size; 1 where it is not given. Failure where it is no number."""
    value = settings.get(key)
    if value is None:
        return 1
    if isinstance(value, bool) or not is_count(str(value)):
        die(f"{key} is {value!r}, not a number of GPUs")
    return int(value)


def find_world(settings: Mapping[str, Any]) -> World:
    """The world size that the engine will want."""
    return World(*(size_of(settings, key) for key in SIZES))
