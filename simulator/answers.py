"""The shapes of answers: whole as objects, streamed as text, since a token must not cost much."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from random import getrandbits
from typing import Any

from engine import Generation
from handoff import handed_on, prompt_ids
from prompts import chat_role
from protocol import ChatCompletionNamedToolChoiceParam as NamedTool
from protocol import ChatCompletionRequest, CompletionRequest
from words import token_id

Json = dict[str, Any]
Request = CompletionRequest | ChatCompletionRequest
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
quoted = lru_cache(maxsize=1 << 14)(encode)
CHAT_CHUNK = ("chatcmpl", "chat.completion.chunk")
COMPLETION_CHUNK = ("cmpl", "text_completion")


def new_id(prefix: str) -> str:
    return f"{prefix}-{getrandbits(128):032x}"


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }


# -- whole answers --


def completion(request: CompletionRequest, served: str, done: Sequence[Generation]) -> Json:
    """Several prompts are answered under the server's name, one under the request's."""
    body = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model if len(done) == 1 else served,
        "choices": [_completion_choice(request, generation) for generation in done],
        "usage": usage(sum(g.prompt.tokens for g in done), sum(len(g.pieces) for g in done)),
        "prompt_token_ids": _ids_handed_on(done[0]) if len(done) == 1 else [],
    }
    return body


def _completion_choice(request: CompletionRequest, generation: Generation) -> Json:
    text = generation.prompt.echo + generation.text if request.echo else generation.text
    return {
        "index": generation.index,
        "text": text if request.detokenize else "",
        "token_ids": None if request.detokenize else [*map(token_id, generation.pieces)],
        "logprobs": None,
        "context_logits": None,
        "finish_reason": generation.finish_reason,
        "stop_reason": generation.stop_reason,
        "disaggregated_params": handed_on(generation),
        "avg_decoded_tokens_per_iter": 1.0,
    }


def _ids_handed_on(generation: Generation) -> list[int] | None:
    return prompt_ids(generation.prompt) if generation.state else None


def chat(request: ChatCompletionRequest, _: str, done: Sequence[Generation]) -> Json:
    (generation,) = done
    choice = {
        "index": 0,
        "message": _chat_message(request, generation),
        "logprobs": _logprobs(request, generation.pieces),
        "finish_reason": generation.finish_reason,
        "stop_reason": generation.stop_reason,
        "mm_embedding_handle": None,
        "disaggregated_params": handed_on(generation),
        "avg_decoded_tokens_per_iter": 1.0,
    }
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": usage(generation.prompt.tokens, len(generation.pieces)),
        "prompt_token_ids": _ids_handed_on(generation),
    }


def _chat_message(request: ChatCompletionRequest, generation: Generation) -> Json:
    content, calls = generation.text, []
    if isinstance(tool := request.tool_choice, NamedTool):  # whatever the text: as its arguments
        function = {"name": tool.function.name, "arguments": content}
        calls = [{"id": new_id("chatcmpl-tool"), "type": "function", "function": function}]
        content = ""
    return {
        "role": chat_role(request),
        "content": generation.prompt.echo + content if request.echo else content,
        "reasoning_content": "",
        "reasoning": None,
        "tool_calls": calls,
    }


def _logprobs(request: ChatCompletionRequest, pieces: Sequence[str]) -> Json | None:
    if not request.logprobs:
        return None
    tokens = [_logprob(piece) for piece in pieces]
    for token in tokens if request.top_logprobs else ():
        token["top_logprobs"] = [dict(token)]
    return {"content": tokens}


def _logprob(piece: str) -> Json:
    """One of the many that a model could have: the simulator's has but this token in mind."""
    chance = -(token_id(piece) % 1000) / 1000
    return {"token": piece, "logprob": chance, "bytes": [*piece.encode()], "top_logprobs": None}


# -- streamed answers: the events of one iteration, an id of its own to each --


def completion_events(request: CompletionRequest, generation: Generation) -> Iterator[str]:
    first, text, pieces = generation.diff()
    if request.echo and first:
        text = generation.prompt.echo + text
    ids = "null" if request.detokenize else encode([*map(token_id, pieces)])
    choice = (
        f'{{"index":{generation.index},"text":{quoted(text if request.detokenize else "")},'
        f'"token_ids":{ids},"logprobs":null,"finish_reason":{_or_null(generation.finish_reason)},'
        f'"stop_reason":{_or_null(generation.stop_reason)},"avg_decoded_tokens_per_iter":1.0}}'
    )
    counted = _usage(request, generation) if _continuous(request) else "null"
    yield _event(COMPLETION_CHUNK, request, choice, f',"usage":{counted}')
    yield from _last_usage(request, generation)


def chat_events(request: ChatCompletionRequest, generation: Generation) -> Iterator[str]:
    first, text, pieces = generation.diff()
    if isinstance(request.tool_choice, NamedTool):
        raise TypeError("tool_calls.0: a ToolCall is no DeltaToolCall")
    if first:
        yield from _chat_opening(request, generation)
    rest = ""
    if logprobs := _logprobs(request, pieces):
        rest = f',"logprobs":{encode(_without_null(logprobs))}'
    if generation.finish_reason:
        rest += f',"finish_reason":"{generation.finish_reason}"'
    if generation.stop_reason is not None:
        rest += f',"stop_reason":{encode(generation.stop_reason)}'
    choice = (
        f'{{"index":0,"delta":{{"content":{quoted(text)},"reasoning_content":""}}{rest},'
        '"avg_decoded_tokens_per_iter":1.0}'
    )
    counted = f',"usage":{_usage(request, generation)}' if _continuous(request) else ""
    yield _event(CHAT_CHUNK, request, choice, counted)
    yield from _last_usage(request, generation)


def _chat_opening(request: ChatCompletionRequest, generation: Generation) -> Iterator[str]:
    deltas = [{"role": chat_role(request)}]
    if request.echo and generation.prompt.echo:
        deltas.append({"content": generation.prompt.echo})
    nothing = encode(usage(generation.prompt.tokens, 0))
    for delta in deltas:
        choice = f'{{"index":0,"delta":{encode(delta)}}}'
        counted = f',"usage":{nothing}' if _continuous(request) else ""
        yield _event(CHAT_CHUNK, request, choice, counted).replace("}\n\n", "} \n\n")


def _last_usage(request: Request, generation: Generation) -> Iterator[str]:
    if generation.finish_reason and request.stream_options and request.stream_options.include_usage:
        yield _event(CHAT_CHUNK, request, "", f',"usage":{_usage(request, generation)}')


def _continuous(request: Request) -> bool:
    options = request.stream_options
    return bool(options and options.include_usage and options.continuous_usage_stats)


def _usage(_: Request, generation: Generation) -> str:
    return encode(usage(generation.prompt.tokens, len(generation.pieces)))


def _event(kind: tuple[str, str], request: Request, choice: str, rest: str) -> str:
    return (
        f'data: {{"id":"{kind[0]}-{getrandbits(128):032x}","object":"{kind[1]}",'
        f'"created":{int(time.time())},"model":{quoted(request.model)},"choices":[{choice}]{rest}'
        "}\n\n"
    )


def _or_null(value: str | int | None) -> str:
    return "null" if value is None else encode(value)


def _without_null(value: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
