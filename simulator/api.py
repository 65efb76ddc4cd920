"""The routes of the OpenAI-compatible server, and how a request becomes sequences."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count

from answers import CHAT, COMPLETIONS, Answer, Dialect, StreamedAnswer, WholeAnswer, Wish
from console import log
from conversion import Json, Values, as_int, as_list
from engine import Engine, Sequence
from environment import Settings
from faults import Faults
from http_parser import Request
from http_server import Connection, to_text
from llm_args import LlmArgs
from prompts import Prompt, chat_prompt, completion_prompts, truncated
from schema import BadRequest, check_chat, check_completion
from stops import StopFilter
from words import continue_text, fingerprint

VERSION = "1.1.0"
MODEL_CONTEXT = 131072  # the simulated model's own limit, when --max_seq_len sets none
Route = Callable[[Request, Connection], None]


class Api:
    def __init__(self, args: LlmArgs, settings: Settings, engine: Engine, faults: Faults) -> None:
        self._args = args
        self._settings = settings
        self._engine = engine
        self._faults = faults
        self._zero_token_requests = 0
        self._serial = count()  # makes sampled answers differ
        self._routes: dict[str, tuple[str, Route]] = {
            "/health": ("GET", self._health),
            "/health_generate": ("GET", self._health_generate),
            "/version": ("GET", _always({"version": VERSION})),
            "/v1/models": ("GET", _always(_model_list(args.served_name))),
            "/metrics": ("GET", _always([])),
            "/perf_metrics": ("GET", _always([])),
            "/kv_cache_events": ("POST", _always([])),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/responses": ("POST", self._responses),
        }

    def __call__(self, request: Request, connection: Connection) -> None:
        if self._faults.hung:
            return
        if request.path not in self._routes:
            self._unknown(request, connection)
            return
        method, route = self._routes[request.path]
        if request.method != method:
            headers = (f"allow: {method}",)
            _send_json(connection, 405, {"detail": "Method Not Allowed"}, headers)
            return
        try:
            route(request, connection)
        except BadRequest as error:
            _send_error(connection, str(error))

    def _unknown(self, request: Request, connection: Connection) -> None:
        bare = request.path.rstrip("/")
        if bare in self._routes:  # FastAPI sends /health/ to /health
            connection.send(307, headers=(f"location: {bare}",))
        else:
            _send_json(connection, 404, {"detail": "Not Found"})

    # -- the small routes --

    def _health(self, _: Request, connection: Connection) -> None:
        self._faults.delay_health(lambda: connection.send(503 if self._faults.unhealthy else 200))

    def _health_generate(self, _: Request, connection: Connection) -> None:
        if self._faults.unhealthy:
            connection.send(500, b"Generation health check failed")
            return

        def done(*_: object) -> None:
            connection.on_disconnect = None
            connection.send(200, b"Generation health check OK")

        sequence = Sequence(0, 1, continue_text("", 0, ""), 1, None, done)
        connection.on_disconnect = lambda: self._engine.cancel(sequence)
        self._engine.submit(sequence)

    def _responses(self, _: Request, __: Connection) -> None:
        raise BadRequest("Responses API only supports harmony format for now")

    # -- generation --

    def _completions(self, request: Request, connection: Connection) -> None:
        values = check_completion(_json_body(request))
        prompts = completion_prompts(values["prompt"])
        self._generate(connection, COMPLETIONS, values, values["max_tokens"], prompts)

    def _chat(self, request: Request, connection: Connection) -> None:
        values = check_chat(_json_body(request))
        prompts = [chat_prompt(values)]
        self._generate(connection, CHAT, values, values["max_completion_tokens"], prompts)

    def _generate(
        self,
        connection: Connection,
        dialect: Dialect,
        values: Values,
        max_tokens: Json,
        prompts: list[Prompt],
    ) -> None:
        if self._faults.broken:
            raise BadRequest("RuntimeError: CUDA error: an illegal memory access was encountered")
        prompts = [truncated(prompt, values["truncate_prompt_tokens"]) for prompt in prompts]
        self._check_sampling(values, max_tokens)
        self._check_lengths(prompts)
        kind = StreamedAnswer if values["stream"] else WholeAnswer
        answer = kind(connection, self._engine, dialect, self._wish(values, prompts))
        answer.start(list(self._sequences(values, max_tokens, prompts, answer)))

    def _check_sampling(self, values: Values, max_tokens: Json) -> None:
        _require(values["temperature"], lambda value: value >= 0, "temperature >= 0")
        _require(values["top_p"], lambda value: 0 <= value <= 1, "0 <= top_p <= 1")
        _require(values["n"], lambda value: value >= 1, "n >= 1")
        _require(values["min_tokens"], lambda value: value >= 0, "min_tokens >= 0")
        _require(values["truncate_prompt_tokens"], lambda value: value >= 1, "at least 1 token")
        n, most = as_int(values["n"]), self._args.max_batch_size
        _require(n, lambda value: value <= most, f"n <= {most}, the maximum batch size")
        _require(values["best_of"], lambda value: value >= n, "best_of >= n")
        _require(max_tokens, lambda value: value >= 0, "max_tokens >= 0")
        if max_tokens == 0:
            self._zero_tokens()
        wanted = values["response_format"]
        constrained = isinstance(wanted, dict) and wanted["type"] != "text"
        if constrained and not self._args.guided_decoding:
            raise BadRequest("response_format needs a guided_decoding_backend")

    def _zero_tokens(self) -> None:
        """Do as the real engine does: survive the first request for nothing, not the second."""
        self._zero_token_requests += 1
        if self._zero_token_requests == 1:
            raise BadRequest("max_tokens must be greater than 0, but got 0")
        log("E", "CppExecutorError: max_tokens 0: the executor has died, shutting down")
        signal.raise_signal(signal.SIGINT)
        self._faults.hung = True

    def _check_lengths(self, prompts: list[Prompt]) -> None:
        limit = self._args.max_seq_len or MODEL_CONTEXT
        for prompt in prompts:
            if prompt.tokens > limit:
                raise BadRequest(
                    f"The prompt length ({prompt.tokens}) exceeds the maximum sequence length "
                    f"({limit}). Please reduce the prompt or raise --max_seq_len."
                )

    def _wish(self, values: Values, prompts: list[Prompt]) -> Wish:
        options = values["stream_options"]
        usage = options if isinstance(options, dict) else {}
        n, echo = as_int(values["n"]), bool(values["echo"])
        return Wish(
            model=str(values["model"]),
            prompt_tokens=sum(prompt.tokens for prompt in prompts),
            echoes=[prompt.echo if echo else "" for prompt in prompts for _ in range(n)],
            detokenize=bool(values.get("detokenize", True)),
            include_usage=bool(usage.get("include_usage")),
            continuous_usage=bool(usage.get("include_usage") and usage["continuous_usage_stats"]),
            stream_interval=self._args.stream_interval,
        )

    def _sequences(
        self, values: Values, max_tokens: Json, prompts: list[Prompt], answer: Answer
    ) -> Iterator[Sequence]:
        n = as_int(values["n"])
        for index in range(n * len(prompts)):
            prompt = prompts[index // n]
            room = max(1, (self._args.max_seq_len or MODEL_CONTEXT) - prompt.tokens)
            seed = self._seed(values, prompt, index % n)
            yield Sequence(
                index=index,
                prompt_tokens=prompt.tokens,
                tokens=continue_text(prompt.text, seed, prompt.opening),
                max_tokens=room if max_tokens is None else min(room, as_int(max_tokens)),
                eos_at=None if values["ignore_eos"] else self._eos_at(values, seed),
                sink=answer.take,
                stop=_stop_filter(values),
                stop_token_ids=frozenset(map(as_int, as_list(values["stop_token_ids"]))),
            )

    def _seed(self, values: Values, prompt: Prompt, choice: int) -> int:
        """Greedy answers follow from the prompt alone, sampled ones also from seed or chance."""
        if values["temperature"] == 0:
            return fingerprint(prompt.text)
        chance = next(self._serial) if values["seed"] is None else (values["seed"], choice)
        return fingerprint(f"{chance} {prompt.text}")

    def _eos_at(self, values: Values, seed: int) -> int:
        low, high = self._settings.output_tokens
        return max(low + seed % (high - low + 1), as_int(values["min_tokens"]))


def _always(document: object) -> Route:
    return lambda _, connection: _send_json(connection, 200, document)


def _model_list(name: str) -> dict[str, object]:
    card = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "tensorrt_llm_simulator",
    }
    return {"object": "list", "data": [card]}


def _require(value: Json, holds: Callable[[float], bool], rule: str) -> None:
    if isinstance(value, (int, float)) and not holds(value):
        raise BadRequest(f"require {rule}, got {value}")


def _json_body(request: Request) -> Json:
    content_type = request.headers.get("content-type", "application/json").partition(";")[0]
    main, _, sub = content_type.strip().lower().partition("/")
    if main != "application" or not (sub == "json" or sub.endswith("+json")):
        return request.body.decode("latin-1")  # as in FastAPI: not JSON, so only a string
    try:
        body: Json = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        mistake = {"type": "json_invalid", "loc": ("body",), "msg": "JSON decode error"}
        raise BadRequest(str([{**mistake, "ctx": {"error": str(error)}}])) from None
    return body


def _stop_filter(values: Values) -> StopFilter | None:
    given = values["stop"]
    stops = [str(stop) for stop in ([given] if isinstance(given, str) else as_list(given)) if stop]
    return StopFilter(stops, include=bool(values["include_stop_str_in_output"])) if stops else None


def _send_json(
    connection: Connection,
    status: int,
    document: object,
    headers: tuple[str, ...] = (),
) -> None:
    body = to_text(document).encode()
    connection.send(status, body, "application/json", headers=headers)


def _send_error(connection: Connection, message: str) -> None:
    error = {
        "object": "error",
        "message": message,
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
    _send_json(connection, 400, error)
