"""Request bodies: the fields of the 1.1.0 protocol and their rules; everything else is refused."""

from __future__ import annotations

from conversion import (
    Field,
    Json,
    Values,
    Wrong,
    boolean,
    convert_fields,
    either,
    fields_of,
    integer,
    list_of,
    mapping,
    mistake,
    number,
    one_of,
    optional,
    text,
    token_ids,
)


class BadRequest(Exception):
    """Answered with status 400 and the flat error body."""


def message(value: Json) -> Json:
    """Check one chat message; roles are free, content is text, parts or null."""
    values = mapping(value)
    assert isinstance(values, dict)
    if "role" not in values:
        raise Wrong("missing", "Field required")
    text(values["role"])
    content = values.get("content")
    if content is not None:
        either(text, list_of(content_part))(content)
    return values


def content_part(value: Json) -> Json:
    part = mapping(value)
    assert isinstance(part, dict)
    if "type" not in part:
        raise Wrong("missing", "Field required")
    if part["type"] == "text":
        text(part.get("text"))
    return part


RESPONSE_FORMAT = {
    "type": Field(
        one_of("text", "json", "json_object", "regex", "ebnf", "structural_tag"), required=True
    ),
    "schema": optional(mapping),
    "regex": optional(text),
    "ebnf": optional(text),
    "format": optional(mapping),
}
STREAM_OPTIONS = {
    "include_usage": optional(boolean, True),
    "continuous_usage_stats": optional(boolean, False),
}
FUNCTION = {
    "name": Field(text, required=True),
    "description": optional(text),
    "parameters": optional(mapping),
}
TOOL = {
    "type": Field(one_of("function"), "function"),
    "function": Field(fields_of(FUNCTION), required=True),
}
NAMED_TOOL = {
    "type": Field(one_of("function"), "function"),
    "function": Field(fields_of({"name": Field(text, required=True)}), required=True),
}
SHARED = {
    "model": Field(text, required=True),
    "best_of": optional(integer),
    "frequency_penalty": optional(number, 0.0),
    "logit_bias": optional(mapping),
    "n": Field(integer, 1),
    "presence_penalty": optional(number, 0.0),
    "seed": optional(integer),
    "stop": optional(either(text, list_of(text)), []),
    "stream": optional(boolean, False),
    "stream_options": optional(fields_of(STREAM_OPTIONS)),
    "temperature": optional(number),
    "top_p": optional(number),
    "user": optional(text),
    "lora_request": optional(mapping),
    "use_beam_search": Field(boolean, False),
    "top_k": Field(integer, 0),
    "top_p_min": Field(number, 0.0),
    "min_p": Field(number, 0.0),
    "repetition_penalty": Field(number, 1.0),
    "length_penalty": Field(number, 1.0),
    "early_stopping": Field(boolean, False),
    "stop_token_ids": optional(list_of(integer), []),
    "include_stop_str_in_output": Field(boolean, False),
    "ignore_eos": Field(boolean, False),
    "min_tokens": Field(integer, 0),
    "skip_special_tokens": Field(boolean, True),
    "spaces_between_special_tokens": Field(boolean, True),
    "truncate_prompt_tokens": optional(integer),
    "response_format": optional(fields_of(RESPONSE_FORMAT)),
    "disaggregated_params": optional(mapping),
}
COMPLETION = {
    **SHARED,
    "prompt": Field(
        either(text, token_ids, list_of(token_ids), list_of(text)),
        required=True,
    ),
    "echo": optional(boolean, False),
    "logprobs": optional(integer),
    "max_tokens": optional(integer),
    "suffix": optional(text),
    "return_context_logits": Field(boolean, False),
    "detokenize": Field(boolean, True),
    "add_special_tokens": Field(boolean, True),
}
CHAT = {
    **SHARED,
    "messages": Field(list_of(message), required=True),
    "prompt_token_ids": optional(token_ids),
    "logprobs": optional(boolean, False),
    "top_logprobs": optional(integer, 0),
    "max_completion_tokens": optional(integer),
    "tools": optional(list_of(fields_of(TOOL))),
    "tool_choice": optional(either(one_of("none", "auto"), fields_of(NAMED_TOOL)), "none"),
    "reasoning_effort": optional(one_of("low", "medium", "high"), "low"),
    "echo": Field(boolean, False),
    "add_generation_prompt": Field(boolean, True),
    "add_special_tokens": Field(boolean, False),
    "documents": optional(list_of(mapping)),
    "chat_template": optional(text),
    "chat_template_kwargs": optional(mapping),
    "cache_salt": optional(text),
}


def check_completion(body: Json) -> Values:
    body = _object(body)
    _refuse(
        (bool(body.get("logprobs")), "logprobs is not supported"),
        (
            bool(body.get("stream_options")) and not body.get("stream"),
            "Stream options can only be defined when stream is true.",
        ),
        (bool(body.get("suffix")), "suffix is not supported"),
    )
    return _check(COMPLETION, body)


def check_chat(body: Json) -> Values:
    body = dict(_object(body))
    if "max_tokens" in body:  # an alias, which wins when both are given
        body["max_completion_tokens"] = body.pop("max_tokens")
    top_logprobs = body.get("top_logprobs")
    _refuse(
        (
            body.get("stream_options") is not None and not body.get("stream"),
            "stream_options can only be set if stream is true",
        ),
        (
            body.get("tool_choice", "none") != "none" and body.get("tools") is None,
            "When using `tool_choice`, `tools` must be set.",
        ),
        (
            isinstance(top_logprobs, int) and top_logprobs < 0,
            "top_logprobs must be positive or zero",
        ),
        (
            top_logprobs is not None and not body.get("logprobs"),
            "logprobs must be true when using top_logprobs",
        ),
        (bool(body.get("suffix")), "suffix is not supported"),
        (
            isinstance(body.get("cache_salt"), str) and not str(body["cache_salt"]).strip(),
            "Parameter 'cache_salt' must be a non-empty string if provided.",
        ),
    )
    return _check(CHAT, body)


def _object(body: Json) -> Values:
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise BadRequest(str([mistake("model_attributes_type", message, (), body)]))
    return body


def _refuse(*rules: tuple[bool, str]) -> None:
    for broken, reason in rules:
        if broken:
            raise BadRequest(str([mistake("value_error", f"Value error, {reason}", (), None)]))


def _check(table: dict[str, Field], body: Values) -> Values:
    values, mistakes = convert_fields(table, body)
    if mistakes:
        raise BadRequest(str(mistakes))
    return values
