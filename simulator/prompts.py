"""Prompts out of requests: the four forms of a completion's, the messages of a chat."""

from __future__ import annotations

from typing import NamedTuple

from conversion import Json, Values, as_int, as_list
from schema import BadRequest
from words import count_tokens


class Prompt(NamedTuple):
    text: str  # what the answer follows from; token ids are written out
    tokens: int
    opening: str  # put before the first word of the answer
    echo: str = ""


def completion_prompts(prompt: Json) -> list[Prompt]:
    """Tell the four forms apart: a text, token ids, or a list of either."""
    if isinstance(prompt, list) and not prompt:
        raise BadRequest("list index out of range")
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        return [_prompt(item) for item in prompt]
    return [_prompt(prompt)]


def _prompt(prompt: Json) -> Prompt:
    if isinstance(prompt, list):
        if not prompt:
            raise BadRequest("prompt token ids must not be empty")
        return Prompt(" ".join(map(str, prompt)) + " #", len(prompt), " ")
    text = str(prompt)
    return Prompt(text, count_tokens(text), "" if not text or text[-1].isspace() else " ", text)


def chat_prompt(values: Values) -> Prompt:
    ids = values["prompt_token_ids"]
    if ids is not None:
        return _prompt(ids)._replace(opening="")
    messages = as_list(values["messages"])
    if not messages:
        raise BadRequest("messages must not be empty without prompt_token_ids")
    texts = [_message_text(message) for message in messages]
    template = 4 * len(messages) + 3  # the marks that a chat template puts around the messages
    return Prompt("\n".join(texts), template + sum(map(count_tokens, texts)), "")


def _message_text(message: Json) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return str(content or "")
    return "\n".join(_part_text(part) for part in content)


def _part_text(part: Json) -> str:
    if not isinstance(part, dict) or part["type"] != "text":
        raise BadRequest("only text parts are supported: the model is not multimodal")
    return str(part["text"])


def truncated(prompt: Prompt, limit: Json) -> Prompt:
    return prompt if limit is None else prompt._replace(tokens=min(prompt.tokens, as_int(limit)))
