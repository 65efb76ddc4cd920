"""Builds answers, whole and streamed; a streamed token has to be cheap."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from random import getrandbits
from typing import Any

from engine import Generation
from fastapi.responses import Response
from handoff import handed_on, prompt_ids
from protocol import AnyRequest, ChatCompletionRequest, CompletionRequest
from protocol import ChatCompletionNamedToolChoiceParam as NamedTool
from pydantic_core import to_json
from words import chat_role, token_id

Json = dict[str, Any]
COMPLETION = ("cmpl", "text_completion")
CHAT = ("chatcmpl", "chat.completion")
CHAT_CHUNK = ("chatcmpl", "chat.completion.chunk")


def always(answer: Response) -> Callable[[], Awaitable[Response]]:
    """A route that always gives the same answer."""

    async def route() -> Response:
        return answer

    return route


def _body(kind: tuple[str, str], model: str, choices: list[Json], **rest: object) -> Json:
    """What all answers have around their choices; each event of a stream has an id of its own."""
    head = {"id": _new_id(kind[0]), "object": kind[1], "created": int(time.time())}
    return {**head, "model": model, "choices": choices, **rest}


def _new_id(prefix: str) -> str:
    return f"{prefix}-{getrandbits(128):032x}"


def _usage(prompt: int, completion: int) -> Json:
    total = prompt + completion
    return {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": completion}


def _usage_of(*done: Generation) -> Json:
    return _usage(sum(g.prompt.tokens for g in done), sum(len(g.pieces) for g in done))


# -- whole answers --


def whole(request: AnyRequest, served: str, done: Sequence[Generation]) -> Json:
    """A whole answer, under the server's name for several prompts, else under the request's."""
    one, usage = len(done) == 1, _usage_of(*done)
    if isinstance(request, CompletionRequest):
        choices = [_completion_choice(request, each) for each in done]
        body = _body(COMPLETION, request.model if one else served, choices, usage=usage)
    else:
        body = _body(CHAT, request.model, [_chat_choice(request, done[0])], usage=usage)
    return {**body, "prompt_token_ids": prompt_ids(done[0]) if one else []}


def _chat_choice(request: ChatCompletionRequest, generation: Generation) -> Json:
    return {
        "index": 0,
        "message": _chat_message(request, generation),
        "logprobs": _logprobs(request, generation.pieces, top_logprobs=None),
        "finish_reason": generation.finish_reason,
        "stop_reason": generation.stop_reason,
        "mm_embedding_handle": None,
        "disaggregated_params": handed_on(generation),
        "avg_decoded_tokens_per_iter": 1.0,
    }


def _completion_choice(request: CompletionRequest, generation: Generation) -> Json:
    """A choice with the text that is new: in a whole answer, all of it."""
    first, text, pieces = generation.diff()
    text = generation.prompt.echo + text if request.echo and first else text
    return {
        "index": generation.index,
        "text": text if request.detokenize else "",
        "token_ids": None if request.detokenize else [*map(token_id, pieces)],
        "logprobs": None,
        "context_logits": None,
        "finish_reason": generation.finish_reason,
        "stop_reason": generation.stop_reason,
        "disaggregated_params": handed_on(generation),
        "avg_decoded_tokens_per_iter": 1.0,
    }


def _chat_message(request: ChatCompletionRequest, generation: Generation) -> Json:
    content, calls = generation.text, []
    if isinstance(tool := request.tool_choice, NamedTool):  # any text becomes the arguments
        function = {"name": tool.function.name, "arguments": content}
        calls = [{"id": _new_id("chatcmpl-tool"), "type": "function", "function": function}]
        content = ""
    return {
        "role": chat_role(request),
        "content": generation.prompt.echo + content if request.echo else content,
        "reasoning_content": "",
        "reasoning": None,
        "tool_calls": calls,
    }


def _logprobs(request: ChatCompletionRequest, pieces: Sequence[str], **unset: None) -> Json | None:
    """The tokens' log probabilities; the simulator never has another token in mind. What is unset
    is null in a whole answer, and missing in a streamed one."""
    if not request.logprobs:
        return None
    content = []
    for piece in pieces:
        chance = -(token_id(piece) % 1000) / 1000
        token = {"token": piece, "logprob": chance, "bytes": [*piece.encode()]}
        content.append(token | ({"top_logprobs": [token]} if request.top_logprobs else unset))
    return {"content": content}


# -- streamed answers: the events of one iteration --


def events(request: AnyRequest, generation: Generation) -> Iterator[bytes]:
    if isinstance(request, CompletionRequest):
        yield from _completion_events(request, generation)
    else:
        yield from _chat_events(request, generation)
    if generation.finish_reason and request.stream_options and request.stream_options.include_usage:
        yield _event(_body(CHAT_CHUNK, request.model, [], usage=_usage_of(generation)))


def _completion_events(request: CompletionRequest, generation: Generation) -> Iterator[bytes]:
    choice = _completion_choice(request, generation)
    del choice["context_logits"], choice["disaggregated_params"]
    counted = _usage_of(generation) if _continuous(request) else None
    yield _event(_body(COMPLETION, request.model, [choice], usage=counted))


def _chat_events(request: ChatCompletionRequest, generation: Generation) -> Iterator[bytes]:
    first, text, pieces = generation.diff()
    if isinstance(request.tool_choice, NamedTool):
        raise TypeError("tool_calls.0: a ToolCall is no DeltaToolCall")
    if first:
        yield from _chat_opening(request, generation)
    choice = {
        "index": 0,
        "delta": {"content": text, "reasoning_content": ""},
        "logprobs": _logprobs(request, pieces),
        "finish_reason": generation.finish_reason,
        "stop_reason": generation.stop_reason,
        "avg_decoded_tokens_per_iter": 1.0,
    }
    choice = {key: value for key, value in choice.items() if value is not None}
    counted = {"usage": _usage_of(generation)} if _continuous(request) else {}
    yield _event(_body(CHAT_CHUNK, request.model, [choice], **counted))


def _chat_opening(request: ChatCompletionRequest, generation: Generation) -> Iterator[bytes]:
    deltas = [{"role": chat_role(request)}]
    if request.echo and generation.prompt.echo:
        deltas.append({"content": generation.prompt.echo})
    counted = {"usage": _usage(generation.prompt.tokens, 0)} if _continuous(request) else {}
    for delta in deltas:
        choice = {"index": 0, "delta": delta}
        yield _event(_body(CHAT_CHUNK, request.model, [choice], **counted), b" \n\n")


def _continuous(request: AnyRequest) -> bool:
    options = request.stream_options
    return bool(options and options.include_usage and options.continuous_usage_stats)


def _event(body: Json, end: bytes = b"\n\n") -> bytes:
    return b"data: " + to_json(body) + end
