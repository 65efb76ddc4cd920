"""Words of a command line, whatever engine they are for."""

from collections.abc import Collection, Sequence
from itertools import zip_longest


def value_of(args: Sequence[str], *flags: str) -> str | None:
    """The last value given for any of a flag's names, as `--flag value` or `--flag=value`."""
    found = None
    for word, following in zip_longest(args, args[1:]):
        name, equals, value = word.partition("=")
        if name in flags:
            found = value if equals else following
    return found


def split_model(words: Sequence[str], switches: Collection[str]) -> tuple[str | None, list[str]]:
    """The model and the other arguments. The model is the first word that is no flag's value."""
    i = 0
    while i < len(words):
        if not words[i].startswith("-"):
            return words[i], [*words[:i], *words[i + 1 :]]
        i += 1 if "=" in words[i] or words[i] in switches else 2
    return None, list(words)


def flags_of(args: Sequence[str], switches: Collection[str]) -> list[str]:
    """The flags among arguments, without their values."""
    flags, i = [], 0
    while i < len(args):
        name, equals, _ = args[i].partition("=")
        flags.append(name)
        i += 1 if equals or name in switches or not name.startswith("--") else 2
    return [flag for flag in flags if flag.startswith("--")]


def without_value(args: Sequence[str], flags: Collection[str]) -> str:
    """The first of `flags` that is the last word, or has another flag after it; '' without one."""
    pairs = zip_longest(args, args[1:], fillvalue="--")
    return next((word for word, after in pairs if word in flags and after.startswith("--")), "")


def is_count(text: str) -> bool:
    """Whether a text is a whole number from 1 that int() takes."""
    return text.isascii() and text.isdigit() and len(text) < 1000 and int(text) > 0
