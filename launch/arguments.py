"""Reading and writing command lines, whatever engine they are for."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

from common.talk import die, misused

FLAG = re.compile(r"--|-[^\d.]")  # a negative number is no flag


def value_of(args: Sequence[str], *flags: str) -> str | None:
    """The last value given for any of a flag's names, as `--flag value` or `--flag=value`."""
    found = None
    for word, following in zip_longest(args, args[1:]):
        name, equals, value = word.partition("=")
        if name in flags:
            found = value if equals else following
    return found


def without(args: Sequence[str], flag: str) -> list[str]:
    """The arguments without that flag and its value."""
    kept, words = [], iter(args)
    for word in words:
        name, equals, _ = word.partition("=")
        if name != flag:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def split_models(words: Sequence[str], switches: Collection[str]) -> tuple[list[str], list[str]]:
    """The models, of which there should be one, and the other arguments.

    A model is a word that is neither a flag nor a flag's value.
    """
    models: list[str] = []
    others: list[str] = []
    i = 0
    while i < len(words):
        if words[i].startswith("-"):
            end = i + (1 if "=" in words[i] or words[i] in switches else 2)
            others += words[i:end]
            i = end
        else:
            models.append(words[i])
            i += 1
    return models, others


def from_home(word: str) -> str:
    """Expand `~/x` and `--flag=~/x`, which no shell has expanded."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return flag + equals + os.path.expanduser(value) if value.startswith("~/") else word  # noqa: PTH111


def flags_of(args: Sequence[str], switches: Collection[str]) -> list[str]:
    """The flags among arguments, without their values."""
    flags, i = [], 0
    while i < len(args):
        name, equals, _ = args[i].partition("=")
        flags.append(name)
        i += 1 if equals or name in switches or not name.startswith("-") else 2
    return [flag for flag in flags if flag.startswith("-")]


def without_value(args: Sequence[str], flags: Collection[str]) -> str:
    """The first of `flags` whose value is missing, empty or another flag; '' if there is none."""
    for word, after in zip_longest(args, args[1:], fillvalue="--"):
        name, equals, value = word.partition("=")
        if name in flags and (not value if equals else not after or FLAG.match(after)):
            return name
    return ""


def is_count(text: str) -> bool:
    """Whether a text is a whole number of at least 1 that int() takes."""
    return text.isascii() and text.isdigit() and len(text) < 1000 and int(text) > 0


def dashed(words: Sequence[str]) -> list[str]:
    """The words with dashes in long flags, for an engine that takes underscores as well."""
    parts = (word.partition("=") if word.startswith("--") else ("", "", word) for word in words)
    return [name.replace("_", "-") + equals + value for name, equals, value in parts]


def given(args: Sequence[str], *flags: str) -> str | None:
    """The value of a flag that may also be written with underscores."""
    return value_of(dashed(args), *flags)


def without_model(words: Sequence[str], *flags: str) -> tuple[str | None, list[str]]:
    """The model (or None) and the other arguments, for an engine whose flags we do not know.

    The model is the first word, or the value of one of `flags`: other words may be flags' values.
    """
    if words and not words[0].startswith("-"):
        if words[1:] and not words[1].startswith("-"):
            misused(f"one MODEL, not two: {words[1]}")
        return words[0], list(words[1:])
    args = list(words)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in flags:
            end = i + (1 if equals else 2)
            return value if equals else "".join(words[i + 1 : end]), args[:i] + args[end:]
    for before, word in pairwise(words):
        if not word.startswith("-") and ("=" in before or not before.startswith("-")):
            misused(f"{word} is not a flag; if it is the MODEL, give it first")
    return None, args


def with_address(args: Sequence[str], port: str) -> tuple[list[str], int]:
    """The arguments, completed with --host and --port if they are missing, and the port."""
    port = value_of(args, "--port") or port
    if not is_count(port) or int(port) > 65535:
        misused(f"the port is {port!r}, not a number from 1 to 65535")
    host = [] if value_of(args, "--host") is not None else ["--host", "0.0.0.0"]
    return [*args, *host, *([] if value_of(args, "--port") else ["--port", port])], int(port)


def size_of(args: Sequence[str], *flags: str) -> int:
    """A size, given by any of its flags, else 1. Failure if it is not a number."""
    value = value_of(args, *flags)
    if value is not None and not is_count(value):
        misused(f"{flags[0]} is {value!r}, not a number of GPUs")
    return int(value or 1)


def as_flags(
    known: Mapping[str, str],
    sizes: Mapping[str, int],
    config: str,
    settings: Mapping[str, str],
    no: str = "",
) -> list[str]:
    """A search candidate as flags. `known` has the flag of each size, `no` is the prefix for false.

    Failure for a size that the engine does not have.
    """
    if missing := [name for name in sizes if name not in known]:
        die(f"the engine has no flag for a size {missing[0]}")
    args = [word for name, size in sizes.items() for word in (known[name], str(size))]
    args += ["--config", str(Path(config).absolute())] if config else []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if value.lower() not in ("true", "false"):
            args += [f"--{name}", value]
        elif value.lower() == "true" or no:
            args.append(f"--{'' if value.lower() == 'true' else no}{name}")
    return args
