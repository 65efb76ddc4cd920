"""What pydantic lets pass and the engine refuses: partly in the server, the rest in a worker."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Sequence
from itertools import chain

from handoff import CONTEXT, KINDS, kind_of
from llm_args import LlmArgs
from protocol import AnyRequest, refuse
from words import VOCABULARY, Prompt

INT32 = range(-(1 << 31), 1 << 31)
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {  # NaN is in none of them
    "temperature": ("temperature >= 0", lambda value: value >= 0),
    "top_p": ("0 < top_p <= 1", lambda value: 0 < value <= 1),
    "top_k": ("top_k >= 0", lambda value: value >= 0),
    "min_p": ("0 <= min_p <= 1", lambda value: 0 <= value <= 1),
    "top_p_min": ("0 <= top_p_min <= 1", lambda value: value <= 1),  # below 0 counts as unset
    "repetition_penalty": ("repetition_penalty > 0", lambda value: value > 0),
    "length_penalty": ("length_penalty >= 0", lambda value: value >= 0),
    "seed": ("0 <= seed < 2^64", lambda value: 0 <= value < 1 << 64),
    "n": ("n >= 1", lambda value: value >= 1),
    "min_tokens": ("min_tokens >= 0", lambda value: value >= 0),
}


class RequestError(Exception):
    """A worker refuses, which is too late for a clean answer to a stream."""


def fail(broken: object, reason: str) -> None:
    if broken:
        raise RequestError(reason)


def check_request(request: AnyRequest, prompts: Sequence[Prompt], args: LlmArgs) -> None:
    """Raise ValueError for what the server refuses by itself. Of a response_format it checks only
    that one of type json has a schema; it ignores the rest."""
    refuse(request.n > 1, "Multiple response is not supported in PyTorch workflow")
    wanted, best_of = request.response_format, request.best_of or request.n
    lacking = wanted and wanted.type == "json" and wanted.schema_ is None
    refuse(lacking, "The 'schema' field is required when response_format.type is 'json'.")
    for key in request.logit_bias or ():
        is_number = re.fullmatch(r"\s*[+-]?\d+(_\d+)*\s*", key)
        refuse(not is_number, f"Invalid logit_bias key '{key}': must be a valid integer token ID")
        outside = int(key) not in range(VOCABULARY)
        refuse(outside, f"Token ID {int(key)} out of vocabulary range [0, {VOCABULARY})")
    refuse(best_of < request.n, f"best_of ({best_of}) cannot be less than n ({request.n})")
    greedy = not request.use_beam_search and request.top_k == 1 and request.top_p == 0
    refuse(
        best_of > 1 and greedy,
        "Greedy decoding in the LLM API does not allow multiple returns. Please set to best_of=1, "
        f"got best_of={best_of}. Please set to best_of=1 or set an environment variable "
        "TLLM_ALLOW_N_GREEDY_DECODING=1 to allow best_of > 1 under the greedy decoding.",
    )
    if params := request.disaggregated_params:
        b64decode(params.encoded_opaque_state or "")
        words = f"Unknown request type: {params.request_type}. Must be "
        refuse(kind_of(request) not in KINDS, words + "{}, {} or {}".format(*KINDS))
    top = getattr(request, "top_logprobs", 0) or 0
    refuse(
        top > 1,
        f"PyTorch backend currently only supports `logprobs=1`. Received `logprobs={top}` "
        f"(Top{top} logprobs). Please set `logprobs=1` in `sampling_params` instead.",
    )
    for prompt in prompts:
        share, most = prompt.tokens / args.cp, args.max_num_tokens
        words = f"The sum of prompt length ({share}), query length (0) should not exceed "
        refuse(most and share > most, f"{words}max_num_tokens ({most})")


def check_engine(request: AnyRequest, prompts: Sequence[Prompt], args: LlmArgs) -> None:
    """Raise RequestError for what only a worker refuses."""
    fail(
        request.disaggregated_params and not args.transceiver,
        "kv_cache_transceiver is disabled, please set 'cache_transceiver_config: "
        "backend:<backend_type>` in config file for disaggregated serving",
    )
    words = "Context only requests are not supported in pytorch backend when overlap is enabled."
    fail(kind_of(request) == CONTEXT and args.overlaps, words)
    for name, (rule, holds) in RANGES.items():
        value = getattr(request, name)
        fail(value is not None and not holds(value), f"require {rule}, got {value}")
    most = request.max_tokens or 0
    fail(most < 0, f"require max_tokens >= 0, got {most}")  # one that is too large is reduced
    numbers = [request.top_k, request.min_tokens, request.best_of or 1]
    numbers += request.stop_token_ids or ()
    for number in chain(numbers, *(prompt.ids for prompt in prompts)):
        fail(number not in INT32, f"{number} does not fit into 32 bits")
    for prompt in prompts:
        fail(
            prompt.tokens // args.cp > args.max_seq_len,
            f"The prompt length ({prompt.tokens}) exceeds the maximum sequence length "
            f"({args.max_seq_len}). Please reduce the prompt or raise --max_seq_len.",
        )
