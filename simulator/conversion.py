"""Values out of JSON, converted as leniently as pydantic converts them.

"5" and 5.0 are integers, "no" is a boolean: what the real server accepts is accepted here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Union

Json = Union[None, bool, int, float, str, list["Json"], dict[str, "Json"]]  # noqa: UP007 (3.9)
Values = dict[str, Json]
Convert = Callable[[Json], Json]


class Wrong(Exception):
    """A value of the wrong type: pydantic's error type and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Field(NamedTuple):
    convert: Convert
    default: Json = None
    required: bool = False
    nullable: bool = False


def text(value: Json) -> Json:
    if not isinstance(value, str):
        raise Wrong("string_type", "Input should be a valid string")
    return value


def integer(value: Json) -> Json:
    if isinstance(value, float) and not value.is_integer():
        raise Wrong("int_from_float", "Input should be a valid integer, got a fractional part")
    if not isinstance(value, (int, float, str)):
        raise Wrong("int_type", "Input should be a valid integer")
    try:
        return int(value)
    except (ValueError, OverflowError):
        raise Wrong("int_parsing", "Input should be a valid integer") from None


def number(value: Json) -> Json:
    if not isinstance(value, (int, float, str)):
        raise Wrong("float_type", "Input should be a valid number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise Wrong("float_parsing", "Input should be a valid number") from None


BOOLEAN_WORDS = {"true": True, "yes": True, "on": True, "t": True, "y": True, "1": True} | {
    word: False for word in ("false", "no", "off", "f", "n", "0")
}


def boolean(value: Json) -> Json:
    word = str(value).lower() if isinstance(value, (bool, int, str)) else ""
    if word not in BOOLEAN_WORDS:
        raise Wrong("bool_parsing", "Input should be a valid boolean")
    return BOOLEAN_WORDS[word]


def mapping(value: Json) -> Json:
    if not isinstance(value, dict):
        raise Wrong("dict_type", "Input should be a valid dictionary")
    return value


def list_of(item: Convert) -> Convert:
    def convert(value: Json) -> Json:
        if not isinstance(value, list):
            raise Wrong("list_type", "Input should be a valid list")
        return [item(element) for element in value]

    return convert


def one_of(*choices: str) -> Convert:
    def convert(value: Json) -> Json:
        if value not in choices:
            expected = " or ".join(map(repr, choices))
            raise Wrong("literal_error", f"Input should be {expected}")
        return value

    return convert


def either(*converts: Convert) -> Convert:
    """Return the first conversion that works; the last one's error when none does."""

    def convert(value: Json) -> Json:
        for attempt in converts[:-1]:
            try:
                return attempt(value)
            except Wrong:
                continue
        return converts[-1](value)

    return convert


def fields_of(table: dict[str, Field]) -> Convert:
    def convert(value: Json) -> Json:
        values, mistakes = convert_fields(table, mapping(value))
        if mistakes:
            raise Wrong(str(mistakes[0]["type"]), str(mistakes[0]["msg"]))
        return values

    return convert


def token_ids(value: Json) -> Json:
    """Accept whole numbers only: a list of digit strings is a list of prompts, not one of ids."""
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise Wrong("int_type", "Input should be a valid integer")
    return value


def optional(convert: Convert, default: Json = None) -> Field:
    return Field(convert, default, nullable=True)


def convert_fields(table: dict[str, Field], body: Json) -> tuple[Values, list[dict[str, object]]]:
    assert isinstance(body, dict)
    values: Values = {}
    mistakes: list[dict[str, object]] = []
    for name, field in table.items():
        try:
            values[name] = _field(field, name, body)
        except Wrong as wrong:
            mistakes.append(mistake(wrong.kind, str(wrong), (name,), body.get(name)))
    for name in body:
        if name not in table:
            refusal = "Extra inputs are not permitted"
            mistakes.append(mistake("extra_forbidden", refusal, (name,), body[name]))
    return values, mistakes


def _field(field: Field, name: str, body: Values) -> Json:
    if name not in body:
        if field.required:
            raise Wrong("missing", "Field required")
        return field.default
    if body[name] is None and field.nullable:
        return field.default if isinstance(field.default, list) else None
    return field.convert(body[name])


def mistake(
    kind: str, message: str, where: tuple[str, ...], value: Json | None
) -> dict[str, object]:
    return {"type": kind, "loc": ("body", *where), "msg": message, "input": value}


def as_int(value: Json) -> int:
    """Tell the type checker what a converted field is."""
    assert isinstance(value, int)
    return value


def as_list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []
