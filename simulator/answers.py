"""Answers to generation requests: whole or streamed, as completions or as chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from engine import Engine, Sequence
from http_server import Connection, to_text
from words import token_id

PLACEHOLDER = "\0text\0"  # where a prepared chunk takes its text
Body = dict[str, object]
Choice = dict[str, object]
# (index, text, token ids or None, finish reason, stop reason) -> a choice of the answer
MakeChoice = Callable[..., Choice]


class Dialect(NamedTuple):
    """What differs between the two endpoints."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole_choice: MakeChoice
    chunk_choice: MakeChoice
    opening: Callable[[int], Choice] | None  # the choice of a first chunk without text


def _completion_choice(
    index: int, text: str, ids: list[int] | None, finish: str | None, reason: object
) -> Choice:
    return {
        "index": index,
        "text": text,
        "token_ids": ids,
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": reason,
        "disaggregated_params": None,
    }


def _chat_choice(
    index: int, text: str, ids: list[int] | None, finish: str | None, reason: object
) -> Choice:
    message: Choice = {
        "role": "assistant",
        "content": text,
        "reasoning_content": None,
        "tool_calls": [],
    }
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": reason,
        "disaggregated_params": None,
    }


def _chat_chunk_choice(
    index: int, text: str, ids: list[int] | None, finish: str | None, reason: object
) -> Choice:
    choice = _chat_delta(index, {"content": text})
    return {**choice, "finish_reason": finish, "stop_reason": reason}


def _chat_delta(index: int, delta: dict[str, object]) -> Choice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


COMPLETIONS = Dialect(
    id_prefix="cmpl",
    whole_object="text_completion",
    chunk_object="text_completion",
    whole_choice=_completion_choice,
    chunk_choice=_completion_choice,
    opening=None,
)
CHAT = Dialect(
    id_prefix="chatcmpl",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    whole_choice=_chat_choice,
    chunk_choice=_chat_chunk_choice,
    opening=lambda index: _chat_delta(index, {"role": "assistant", "content": ""}),
)


class Wish(NamedTuple):
    """How the client wants its answer."""

    model: str
    prompt_tokens: int
    echoes: list[str]  # text to repeat before each choice
    detokenize: bool = True
    include_usage: bool = False
    continuous_usage: bool = False
    stream_interval: int = 1


class Answer:
    """An answer in the making: receives the sequences' tokens, frees them if the client leaves."""

    def __init__(
        self, connection: Connection, engine: Engine, dialect: Dialect, wish: Wish
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._dialect = dialect
        self._wish = wish
        self._id = f"{dialect.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sequences: list[Sequence] = []
        self._left = 0

    def start(self, sequences: list[Sequence]) -> None:
        self._sequences = sequences
        self._left = len(sequences)
        self._connection.on_disconnect = self._cancel
        for sequence in sequences:
            self._engine.submit(sequence)

    def take(self, sequence: Sequence, text: str, finish: str | None) -> None:
        raise NotImplementedError

    def _cancel(self) -> None:
        for sequence in self._sequences:
            self._engine.cancel(sequence)

    def _shown(self, sequence: Sequence, text: str) -> str:
        """Return the text as the client sees it: echoed prompt first, nothing undetokenized."""
        if not self._wish.detokenize:
            return ""
        return self._wish.echoes[sequence.index] + text if sequence.count == 1 else text

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._wish.prompt_tokens, sum(s.count for s in self._sequences)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
        }

    def _body(self, kind: str, choices: list[Choice], usage: dict[str, int] | None) -> Body:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._wish.model,
            "choices": choices,
            "usage": usage,
        }


class WholeAnswer(Answer):
    def start(self, sequences: list[Sequence]) -> None:
        self._texts = ["" for _ in sequences]
        self._ids: list[list[int]] = [[] for _ in sequences]
        self._choices: list[Choice] = [{} for _ in sequences]
        super().start(sequences)

    def take(self, sequence: Sequence, text: str, finish: str | None) -> None:
        index = sequence.index
        self._texts[index] += self._shown(sequence, text)
        if not self._wish.detokenize:
            self._ids[index].append(token_id(sequence.last_token))
        if finish:
            self._finish(index, finish, sequence.stop_reason)

    def _finish(self, index: int, finish: str, reason: object) -> None:
        ids = None if self._wish.detokenize else self._ids[index]
        self._choices[index] = self._dialect.whole_choice(
            index, self._texts[index], ids, finish, reason
        )
        self._left -= 1
        if self._left == 0:
            body = self._body(self._dialect.whole_object, self._choices, self._usage())
            body["prompt_token_ids"] = None
            self._connection.send(200, to_text(body).encode(), "application/json")


class StreamedAnswer(Answer):
    def start(self, sequences: list[Sequence]) -> None:
        # A token costs a concatenation, not a JSON document: that is the point of the frames.
        self._frames = [self._frame(index) for index in range(len(sequences))]
        self._plain = not self._wish.continuous_usage and self._wish.detokenize
        self._held = ["" for _ in sequences]
        self._held_ids: list[list[int]] = [[] for _ in sequences]
        self._connection.start_stream()
        super().start(sequences)

    def take(self, sequence: Sequence, text: str, finish: str | None) -> None:
        index, interval = sequence.index, self._wish.stream_interval
        if sequence.count == 1 and self._dialect.opening:
            self._event([self._dialect.opening(index)])
        if self._plain and interval == 1 and not finish and sequence.count > 1:
            before, after = self._frames[index]
            self._connection.stream(before + _quoted(text) + after)
            return
        self._held[index] += self._shown(sequence, text)
        self._held_ids[index].append(token_id(sequence.last_token))
        if finish or sequence.count == 1 or sequence.count % interval == 0:
            self._flush(sequence, finish)
        if finish:
            self._finish()

    def _flush(self, sequence: Sequence, finish: str | None) -> None:
        """Send what one iteration of the engine, or several, have produced."""
        index = sequence.index
        ids = None if self._wish.detokenize else self._held_ids[index]
        choice = self._dialect.chunk_choice(
            index, self._held[index], ids, finish, sequence.stop_reason
        )
        self._held[index], self._held_ids[index] = "", []
        self._event([choice], self._usage() if self._wish.continuous_usage else None)

    def _finish(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._wish.include_usage:
            self._event([], self._usage())
        self._connection.stream(b"data: [DONE]\n\n")
        self._connection.end_stream()

    def _event(self, choices: list[Choice], usage: dict[str, int] | None = None) -> None:
        body = self._body(self._dialect.chunk_object, choices, usage)
        self._connection.stream(b"data: %b\n\n" % to_text(body).encode())

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """Return the bytes before and after the text of an ordinary chunk."""
        choice = self._dialect.chunk_choice(index, PLACEHOLDER, None, None, None)
        body = to_text(self._body(self._dialect.chunk_object, [choice], None))
        before, after = body.split(to_text(PLACEHOLDER))
        return f"data: {before}".encode(), f"{after}\n\n".encode()


@lru_cache(maxsize=1 << 14)
def _quoted(text: str) -> bytes:
    return to_text(text).encode()
