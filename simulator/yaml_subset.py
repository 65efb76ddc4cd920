"""Enough YAML for `--extra_llm_api_options`: nested blocks, lists, scalars, one-line [..] and {..}.

The standard library has no YAML. What lies outside this subset is refused, never misread.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Union

Yaml = Union[None, bool, int, float, str, list["Yaml"], dict[str, "Yaml"]]  # noqa: UP007 (3.9)

WORDS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("null", "~", ""), None),
}
KEY = re.compile(
    r"""(?P<quote>["']?)(?P<key>[^\s:"'{}\[\],&*!|>%@`#-][^:"']*?)(?P=quote)\s*:(?:\s+|$)"""
)
INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)")
FLOAT = re.compile(r"[-+]?\d+\.\d*([eE][-+]\d+)?")  # YAML 1.1: 1e3 is a word
COMMENT = re.compile(r"(?:^|\s)#.*$")
QUOTED = re.compile(r""""[^"\\]*"|'[^']*'""")


class YamlError(ValueError):
    pass


class Line(NamedTuple):
    number: int
    indent: int
    text: str


def parse_yaml(text: str) -> Yaml:
    lines = [line for line in map(_line, range(1, 10**9), text.splitlines()) if line]
    if not lines:
        return None
    value, rest = _block(lines)
    if rest:
        raise _error(rest[0], "does not belong to the block above it")
    return value


def _line(number: int, raw: str) -> Line | None:
    text = _without_comment(raw).rstrip()
    stripped = text.lstrip(" ")
    if not stripped or (stripped == "---" and text == "---"):
        return None
    line = Line(number, len(text) - len(stripped), stripped)
    if stripped.startswith("\t"):
        raise _error(line, "found character '\\t' that cannot start any token")
    return line


def _without_comment(raw: str) -> str:
    """Cut a comment; a # inside quotes is text, so quoted parts are masked while searching."""
    masked = QUOTED.sub(lambda match: "x" * len(match.group()), raw)
    found = COMMENT.search(masked)
    return raw[: found.start()] if found else raw


def _block(lines: list[Line]) -> tuple[Yaml, list[Line]]:
    """Parse the block that starts at the first line; return it and the lines after it."""
    first = lines[0]
    if first.text == "-" or first.text.startswith("- "):
        return _list(lines)
    if KEY.match(first.text):
        return _mapping(lines)
    return _scalar(first.text, first), lines[1:]


def _mapping(lines: list[Line]) -> tuple[Yaml, list[Line]]:
    indent, result = lines[0].indent, dict[str, Yaml]()
    while lines and lines[0].indent == indent and (match := KEY.match(lines[0].text)):
        line, key = lines[0], match["key"]
        if key in result:
            raise _error(line, f"found duplicate key {key!r}")
        result[key], lines = _value(line._replace(text=line.text[match.end() :]), lines[1:])
    return result, lines


def _list(lines: list[Line]) -> tuple[Yaml, list[Line]]:
    indent, result = lines[0].indent, list[Yaml]()
    while lines and lines[0].indent == indent and re.match(r"-(\s|$)", lines[0].text):
        line = lines[0]
        inner = line.text[1:].lstrip()
        if KEY.match(inner):  # a mapping that starts on the dash's own line
            column = indent + len(line.text) - len(inner)
            value, lines = _block([Line(line.number, column, inner), *lines[1:]])
        else:
            value, lines = _value(line._replace(text=inner), lines[1:])
        result.append(value)
    return result, lines


def _value(line: Line, rest: list[Line]) -> tuple[Yaml, list[Line]]:
    """Return what follows `key:` or `-`: the rest of the line, or the deeper block below it."""
    if line.text:
        return _scalar(line.text, line), rest
    deeper = rest and (
        rest[0].indent > line.indent
        or (rest[0].indent == line.indent and rest[0].text.startswith("- "))
    )
    return _block(rest) if deeper else (None, rest)


def _scalar(text: str, line: Line) -> Yaml:
    text = text.strip()
    if QUOTED.fullmatch(text):
        return text[1:-1]
    if text[:1] in "[{" and text:
        return _flow(text, line)
    if text[:1] in tuple("&*!|>%@`\"'") or ": " in text:
        raise _error(line, f"the simulator's YAML reader does not understand {text!r}")
    return _plain(text)


def _plain(text: str) -> Yaml:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text


def _flow(text: str, line: Line) -> Yaml:
    if text[-1] != {"[": "]", "{": "}"}[text[0]]:
        raise _error(line, "a [..] or {..} must end on its own line")
    if any(set(quoted) & set(",:[]{}") for quoted in QUOTED.findall(text)):
        raise _error(line, "the simulator's YAML reader wants plain words inside [..] and {..}")
    parts = _split_flow(text[1:-1])
    if text[0] == "[":
        return [_scalar(part, line) for part in parts]
    pairs = [part.partition(":") for part in parts]
    return {key.strip().strip("'\""): _scalar(value, line) for key, _, value in pairs}


def _split_flow(text: str) -> list[str]:
    """Split at the commas that are in no inner bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _error(line: Line, message: str) -> YamlError:
    return YamlError(f"line {line.number}: {message}")
