"""What pydantic lets pass and the engine refuses: some of it in the server, the rest in a worker."""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Callable, Iterable
from typing import Any, Union

from llm_args import LlmArgs
from prompts import Prompt
from protocol import ChatCompletionRequest, CompletionRequest
from words import VOCABULARY

Request = Union[CompletionRequest, ChatCompletionRequest]
INT32 = range(-(1 << 31), 1 << 31)
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("temperature >= 0", lambda value: value >= 0),
    "top_p": ("0 < top_p <= 1", lambda value: 0 < value <= 1),
    "top_k": ("top_k >= 0", lambda value: value >= 0),
    "min_p": ("0 <= min_p <= 1", lambda value: 0 <= value <= 1),
    "top_p_min": ("0 <= top_p_min <= 1", lambda value: value <= 1),  # below 0 counts as unset
    "repetition_penalty": ("repetition_penalty > 0", lambda value: value > 0),
    "length_penalty": ("length_penalty >= 0", lambda value: value >= 0),
    "seed": ("seed >= 0, and 64 bits", lambda value: 0 <= value < 1 << 64),
    "n": ("n >= 1", lambda value: value >= 1),
    "min_tokens": ("min_tokens >= 0", lambda value: value >= 0),
}


class RequestError(Exception):
    """A worker refuses: too late for a clean answer to a stream."""


def check_request(request: Request) -> None:
    """Raise ValueError for what the server refuses by itself, as `SamplingParams` does first."""
    if request.n > 1:
        raise ValueError("Multiple response is not supported in PyTorch workflow")
    _check_format(request)
    _check_logit_bias(request.logit_bias or {})
    _check_best_of(request, request.best_of or request.n)
    if request.disaggregated_params and request.disaggregated_params.encoded_opaque_state:
        b64decode(request.disaggregated_params.encoded_opaque_state)
    if isinstance(request, ChatCompletionRequest) and (request.top_logprobs or 0) > 1:
        raise ValueError(
            "PyTorch backend currently only supports `logprobs=1`. Received "
            f"`logprobs={request.top_logprobs}` (Top{request.top_logprobs} logprobs). Please set "
            "`logprobs=1` in `sampling_params` instead."
        )


def _check_format(request: Request) -> None:
    wanted = request.response_format
    if wanted and wanted.type == "json" and wanted.schema_ is None:
        raise ValueError(
            "The 'schema' field is required when response_format.type is 'json'."
        )  # what else it says is ignored, unless a guided_decoding_backend is there to obey it


def _check_logit_bias(logit_bias: Iterable[str]) -> None:
    for key in logit_bias:
        try:
            number = int(key)
        except ValueError:
            words = f"Invalid logit_bias key '{key}': must be a valid integer token ID"
            raise ValueError(words) from None
        if not 0 <= number < VOCABULARY:
            raise ValueError(f"Token ID {number} out of vocabulary range [0, {VOCABULARY})")


def _check_best_of(request: Request, best_of: int) -> None:
    if best_of < request.n:
        raise ValueError(f"best_of ({best_of}) cannot be less than n ({request.n})")
    greedy = not request.use_beam_search and request.top_k == 1 and request.top_p == 0
    if best_of > 1 and greedy:
        raise ValueError(
            "Greedy decoding in the LLM API does not allow multiple returns. Please set to "
            f"best_of=1, got best_of={best_of}. Please set to best_of=1 or set an environment "
            "variable TLLM_ALLOW_N_GREEDY_DECODING=1 to allow best_of > 1 under the greedy "
            "decoding."
        )


def check_num_tokens(prompts: Iterable[Prompt], args: LlmArgs) -> None:
    for prompt in prompts:
        if args.max_num_tokens and prompt.tokens / args.cp > args.max_num_tokens:
            raise ValueError(
                f"The sum of prompt length ({prompt.tokens / args.cp}), query length (0) should "
                f"not exceed max_num_tokens ({args.max_num_tokens})"
            )


def check_engine(
    request: Request, max_tokens: int | None, prompts: Iterable[Prompt], args: LlmArgs
) -> None:
    """Raise RequestError for what only a worker refuses."""
    if request.disaggregated_params and not args.has_transceiver:
        raise RequestError("kv_cache_transceiver is disabled, please set 'cache_transceiver_config")
    for name, (rule, holds) in RANGES.items():
        value = getattr(request, name)
        if value is not None and (math.isnan(value) or not holds(value)):
            raise RequestError(f"require {rule}, got {value}")
    if max_tokens is not None and max_tokens < 0:  # one too large is made smaller
        raise RequestError(f"require max_tokens >= 0, got {max_tokens}")
    for number in _int32s(request):
        if number not in INT32:
            raise RequestError(f"{number} does not fit into 32 bits")
    for prompt in prompts:
        if prompt.tokens // args.cp > args.max_seq_len:
            raise RequestError(
                f"The prompt length ({prompt.tokens}) exceeds the maximum sequence length "
                f"({args.max_seq_len}). Please reduce the prompt or raise --max_seq_len."
            )


def _int32s(request: Request) -> Iterable[int]:
    ids: Any = request.prompt if isinstance(request, CompletionRequest) else [
        request.prompt_token_ids or []
    ]  # fmt: skip
    yield from (request.top_k, request.min_tokens, request.best_of or 1)
    yield from request.stop_token_ids or ()
    for item in ids if isinstance(ids, list) else ():
        yield from [item] if isinstance(item, int) else item if isinstance(item, list) else ()
