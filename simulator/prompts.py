"""Prompts out of requests: the four forms of a completion's, the messages of a chat."""

from __future__ import annotations

from typing import Any, NamedTuple

from protocol import ChatCompletionRequest, CompletionRequest
from words import count_tokens


class Prompt(NamedTuple):
    text: str  # what the answer follows from; token ids are written out
    tokens: int
    opening: str  # put before the first word of the answer
    echo: Any = ""  # put before the answer when asked for: ids cannot be, as in the real server


def prompts_of(request: CompletionRequest | ChatCompletionRequest) -> list[Prompt]:
    """Of a completion in four forms: a text, token ids, or a list of either."""
    if isinstance(request, ChatCompletionRequest):
        return [_chat_prompt(request)]
    prompt: Any = request.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [_prompt(prompt, request.truncate_prompt_tokens)]
    return [_prompt(item, request.truncate_prompt_tokens) for item in prompt]


def _prompt(prompt: str | list[int], limit: int | None) -> Prompt:
    if isinstance(prompt, str):
        opening = "" if not prompt or prompt[-1].isspace() else " "
        return Prompt(prompt, _truncated(count_tokens(prompt), limit), opening, prompt)
    if not prompt:
        raise ValueError("prompt token ids must not be empty")
    return Prompt(" ".join(map(str, prompt)) + " #", len(prompt), " ", prompt)


def _truncated(tokens: int, limit: int | None) -> int:
    return tokens if limit is None else min(tokens, limit)


def chat_role(request: ChatCompletionRequest) -> str:
    """Whom the answer is by: a prompt that is not opened for the assistant goes on as it ends."""
    return "assistant" if request.add_generation_prompt else str(request.messages[-1]["role"])


def _chat_prompt(request: ChatCompletionRequest) -> Prompt:
    role, texts = chat_role(request), [_message_text(message) for message in request.messages]
    echo = texts[-1] if texts and request.messages[-1]["role"] == role else ""
    if (ids := request.prompt_token_ids) is not None:
        return _prompt(ids, None)._replace(opening="", echo=echo)
    if not texts:
        raise ValueError("messages must not be empty without prompt_token_ids")
    template = 4 * len(texts) + 3  # the marks that a chat template puts around the messages
    tokens = _truncated(template + sum(map(count_tokens, texts)), request.truncate_prompt_tokens)
    return Prompt("\n".join(texts), tokens, "", echo)


def _message_text(message: Any) -> str:  # noqa: ANN401 (one of nine TypedDicts)
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [_part_text(part) for part in content or ()]  # here pydantic checks them, not before
    return "\n".join(filter(None, parts))


def _part_text(part: dict[str, Any]) -> str | None:
    """Return a text, or None for a part that says nothing; it is skipped."""
    kind = part.get("type")
    if kind == "text":
        return part.get("text")
    if kind not in ("image_url", "video_url", "audio_url"):
        raise NotImplementedError(f"Unknown part type: {kind}")
    if (part.get(kind) or {}).get("url") is None:
        return None
    raise ValueError("only text parts are supported: the model is not multimodal")
