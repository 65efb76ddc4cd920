"""The prompts of requests: random token ids of an exact length, or ShareGPT's conversations."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Protocol

# Ids that every vocabulary has, above the special tokens at its beginning.
FIRST_ID, LAST_ID = 1000, 20_000
WORDS = ("time", "year", "people", "way", "day", "thing", "world", "life", "hand", "part", "child")


class Prompts(Protocol):
    """The prompt and the wanted output length of the request with this index."""

    def __call__(self, index: int) -> tuple[str | list[int], int]: ...


@dataclass(frozen=True)
class RandomPrompts:
    """Prompts that all differ, so that no prefix cache helps; a seed always gives the same ones."""

    input_len: int
    output_len: int
    seed: str
    text: bool = False  # if the server takes no token ids: about as many words

    def __call__(self, index: int) -> tuple[str | list[int], int]:
        rng = random.Random(f"{self.seed}/{index}")
        if self.text:
            return " ".join(rng.choices(WORDS, k=self.input_len)), self.output_len
        return rng.choices(range(FIRST_ID, LAST_ID), k=self.input_len), self.output_len


@dataclass(frozen=True)
class Conversations:
    """ShareGPT's first questions; each answer may be as long as the one in the data set."""

    turns: tuple[tuple[str, int], ...]

    def __call__(self, index: int) -> tuple[str | list[int], int]:
        return self.turns[index % len(self.turns)]


@dataclass(frozen=True)
class Dialect:
    """What a server understands of the OpenAI API, and of ignore_eos, which is not part of it."""

    chat: bool = False
    length: str = "max_tokens"  # or max_completion_tokens
    token_ids: bool = True  # as a completion's prompt
    stream_options: bool = True
    temperature: bool = True
    ignore_eos: bool = True

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def text(self) -> bool:
        """Are prompts texts, whose length in tokens only the server knows?"""
        return self.chat or not self.token_ids


@dataclass(frozen=True)
class Requests:
    """Bodies of completion requests, with no field that the server does not know."""

    model: str
    prompts: Prompts
    dialect: Dialect = Dialect()
    longest: int = 0  # most tokens of an answer in a warm-up; 0: no limit

    def __call__(self, index: int) -> bytes:
        prompt, length = self.prompts(index)
        said = {"messages": [{"role": "user", "content": prompt}]} if self.dialect.chat else None
        body: dict[str, Any] = {
            "model": self.model,
            **(said or {"prompt": prompt}),
            self.dialect.length: min(length, self.longest or length),
            "stream": True,
        }
        if self.dialect.temperature:
            body["temperature"] = 0.0
        if self.dialect.stream_options:
            body["stream_options"] = {"include_usage": True}
        if self.dialect.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body, separators=(",", ":")).encode()
