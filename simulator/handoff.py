"""What a context server hands to a generation server, by way of the orchestrator.

The real one hands on its first token and the address from which the prompt's keys and values can be
fetched; this one hands on what determines the answer. Both are opaque to the orchestrator.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from itertools import count
from typing import Any

from engine import Generation
from llm_args import LlmArgs
from words import TOKEN, Prompt, continue_text, token_id

CONTEXT, GENERATION, BOTH = KINDS = "context_only", "generation_only", "context_and_generation"
request_ids = count(1)


def kind_of(request: Any) -> str:  # noqa: ANN401 (either request)
    params = request.disaggregated_params
    return params.request_type.lower() if params else BOTH


def state_of(prompt: Prompt, seed: int, args: LlmArgs) -> str:
    state = (args.served_name, args.transceiver, seed, prompt.text, prompt.opening)
    return b64encode(json.dumps(state).encode()).decode()


def handed_on(generation: Generation) -> dict[str, Any] | None:
    """The `disaggregated_params` of an answer: only a context server's has them."""
    if not generation.state:
        return None
    return {
        "request_type": CONTEXT,
        "first_gen_tokens": [*map(token_id, generation.pieces)],
        "ctx_request_id": next(request_ids),
        "encoded_opaque_state": generation.state,
        "draft_tokens": None,
    }


def prompt_ids(generation: Generation) -> list[int] | None:
    """As many ids as the prompt has tokens, which a context server hands on, too; else None."""
    if not generation.state:
        return None
    prompt = generation.prompt
    ids = [*(prompt.ids or map(token_id, TOKEN.findall(prompt.text)))]
    return (ids + [0] * prompt.tokens)[: prompt.tokens]


def taken_over(params: Any, args: LlmArgs) -> tuple[int, str, str]:  # noqa: ANN401
    """Seed, text and opening to go on with. ValueError if they are not from a server like ours."""
    if params.first_gen_tokens is None or params.ctx_request_id is None:
        raise ValueError("__init__(): incompatible function arguments: ContextPhaseParams")
    try:
        *theirs, seed, text, opening = json.loads(b64decode(params.encoded_opaque_state or ""))
        first = next(continue_text(text, seed, opening))
    except (ValueError, TypeError):
        raise ValueError("[simulator] there is no state to fetch the KV cache by") from None
    if theirs != (ours := [args.served_name, args.transceiver]):
        words = f"{' by '.join(theirs)} is not for {' by '.join(map(str, ours))}"
        raise ValueError(f"[simulator] the KV cache of {words}")
    if params.first_gen_tokens != [token_id(first)]:
        raise ValueError("[simulator] first_gen_tokens is not what the context server has answered")
    return seed, text, opening
