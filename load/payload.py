"""What the requests ask: random token ids of an exact length, or ShareGPT's conversations."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Protocol

# Ids that every vocabulary has, above the special tokens that most begin with.
FIRST_ID, LAST_ID = 1000, 20_000
WORDS = ("time", "year", "people", "way", "day", "thing", "world", "life", "hand", "part", "child")


class Prompts(Protocol):
    """The prompt and the wanted output length of the request with this index."""

    def __call__(self, index: int) -> tuple[str | list[int], int]: ...


@dataclass(frozen=True)
class RandomPrompts:
    """No two alike, so that no prefix cache knows them; the same ones for the same seed."""

    input_len: int
    output_len: int
    seed: str
    text: bool = False  # a chat has no token ids: about as many words

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
class Requests:
    """Bodies of completion requests. No field that the OpenAI API lacks, but ignore_eos."""

    model: str
    prompts: Prompts
    chat: bool = False
    ignore_eos: bool = True
    longest: int = 0  # a warm-up need not write as much

    def __call__(self, index: int) -> bytes:
        prompt, length = self.prompts(index)
        length = min(length, self.longest or length)
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": length}
            if self.chat
            else {"prompt": prompt, "max_tokens": length}
        )
        body = {
            "model": self.model,
            **asked,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        return json.dumps(body, separators=(",", ":")).encode()
