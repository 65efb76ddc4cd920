"""The routes of the OpenAI-compatible server, and how a request becomes an answer."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import count
from typing import Annotated, Any, NamedTuple, Union

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import answers
from console import log
from engine import Engine, Generation, stops_of
from environment import Settings
from faults import Faults
from limits import RequestError, check_engine, check_num_tokens, check_request
from llm_args import LlmArgs
from prompts import Prompt, chat_prompt, completion_prompts
from protocol import ChatCompletionRequest, CompletionRequest, ResponsesRequest
from words import continue_text, fingerprint

VERSION = "1.1.0"
QUEUE_PATIENCE = 2.0  # seconds for which an empty queue of statistics is waited for
OWNER = "tensorrt_llm_simulator"
Events = Callable[[Any, Generation], Iterator[str]]
Whole = Callable[[Any, str, Sequence[Generation]], answers.Json]


class Job(NamedTuple):
    request: answers.Request
    prompts: list[Prompt]
    max_tokens: int | None


class Api:
    def __init__(self, args: LlmArgs, settings: Settings, engine: Engine, faults: Faults) -> None:
        self._args = args
        self._settings = settings
        self._engine = engine
        self._faults = faults
        self._zero_token_requests = 0
        self._serial = count()  # makes sampled answers differ

    def app(self) -> ASGIApp:
        app = FastAPI(strict_content_type=False)
        app.add_exception_handler(RequestValidationError, _invalid)
        gets = "health health_generate version metrics perf_metrics steady_clock_offset".split()
        for name in gets:
            app.add_api_route(f"/{name}", getattr(self, name), methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/steady_clock_offset", self.set_clock_offset, methods=["POST"])
        app.add_api_route("/kv_cache_events", self.metrics, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/responses", self.responses, methods=["POST"])
        if self._args.prometheus:
            app.add_api_route("/prometheus/metrics", self.prometheus, methods=["GET"])
        return self._unless_hung(app)

    def _unless_hung(self, app: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if not self._faults.hung or scope["type"] != "http":
                return await app(scope, receive, send)
            while (await receive())["type"] != "http.disconnect":
                pass

        return answer

    # -- the small routes --

    async def health(self) -> Response:
        await asyncio.sleep(self._faults.health_delay)
        return Response(status_code=503 if self._faults.unhealthy else 200)

    async def health_generate(self, raw: Request) -> Response:
        if not self._faults.unhealthy:
            hi: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            request = ChatCompletionRequest(**hi, model=self._args.served_name, temperature=0)
            if (await self.chat(request, raw)).status_code == 200:
                return Response("Generation health check OK")
        return Response("Generation health check failed", 500)

    async def version(self) -> Response:
        return JSONResponse({"version": VERSION})

    async def models(self) -> Response:
        card = {"id": self._args.served_name, "object": "model", "created": int(time.time())}
        return JSONResponse({"object": "list", "data": [{**card, "owned_by": OWNER}]})

    async def metrics(self) -> Response:
        await asyncio.sleep(QUEUE_PATIENCE if self._engine.submitted else 0)
        return JSONResponse([])

    async def perf_metrics(self) -> Response:
        return JSONResponse([])

    async def prometheus(self) -> Response:
        return Response("", media_type="text/plain; version=0.0.4")

    async def steady_clock_offset(self) -> Response:
        received = time.monotonic()
        await asyncio.sleep(0.2)
        return JSONResponse({"receive_ts": received, "transmit_ts": time.monotonic()})

    async def set_clock_offset(self, offset: Annotated[float, Body(embed=True)]) -> Response:
        log("I", f"The steady clock offset between local and disagg server: {offset} second")
        return Response()

    async def responses(self, request: ResponsesRequest) -> Response:  # type: ignore[valid-type]
        return _refusal("Responses API only supports harmony format for now")

    # -- generation --

    async def completions(self, request: CompletionRequest, raw: Request) -> Response:
        shapes = (answers.completion_events, answers.completion)
        return await self._answer(request, raw, completion_prompts, request.max_tokens, *shapes)

    async def chat(self, request: ChatCompletionRequest, raw: Request) -> Response:
        shapes = (answers.chat_events, answers.chat)
        limit = request.max_completion_tokens
        return await self._answer(request, raw, lambda r: [chat_prompt(r)], limit, *shapes)

    async def _answer(
        self,
        request: answers.Request,
        raw: Request,
        prompts_of: Callable[[Any], list[Prompt]],
        max_tokens: int | None,
        events: Events,
        whole: Whole,
    ) -> Response:
        """What is refused before a worker sees it is told; later a stream has begun, and is cut."""
        try:
            if self._faults.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            check_request(request)
            prompts = prompts_of(request)
            check_num_tokens(prompts, self._args)
            job = Job(request, prompts, max_tokens)
            if request.stream:
                return StreamingResponse(self._stream(job, events), media_type="text/event-stream")
            await self._check_engine(job)
            done = await self._finish(job, raw)
            return JSONResponse(whole(request, self._args.served_name, done))
        except Exception as error:
            return _refusal(str(error))

    async def _check_engine(self, job: Job) -> None:
        check_engine(job.request, job.max_tokens, job.prompts, self._args)
        if job.max_tokens == 0:  # the real engine survives the first request for nothing
            self._zero_token_requests += 1
            if self._zero_token_requests == 1:
                raise RequestError("max_tokens must be greater than 0, but got 0")
            log("E", "CppExecutorError: max_tokens 0: the executor has died, shutting down")
            for _ in range(2):  # the second cuts what is open
                signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()

    async def _finish(self, job: Job, raw: Request) -> list[Generation]:
        """Return the answers once all are whole, or early when nobody waits for them any more."""
        done = asyncio.Event()

        def take(_: Generation) -> None:
            if all(generation.finish_reason for generation in generations):
                done.set()

        generations = [*self._generations(job, math.inf, take)]
        for generation in generations:
            self._engine.submit(generation)
        ends = [asyncio.ensure_future(end) for end in (done.wait(), raw.receive())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave(generations, *ends)
        return generations

    def _leave(self, generations: list[Generation], *ends: asyncio.Future[Any]) -> None:
        for generation in generations:
            self._engine.cancel(generation)
        for end in ends:
            end.cancel()

    async def _stream(self, job: Job, events: Events) -> AsyncIterator[str]:
        await self._check_engine(job)
        queue = asyncio.Queue[Union[str, Exception]]()

        def take(generation: Generation) -> None:
            try:
                for event in events(job.request, generation):
                    queue.put_nowait(event)
            except Exception as error:
                queue.put_nowait(error)

        generations = [*self._generations(job, self._args.stream_interval, take)]
        for generation in generations:
            self._engine.submit(generation)
        try:
            while not queue.empty() or not all(each.finish_reason for each in generations):
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                yield event
            yield "data: [DONE]\n\n"
        finally:
            self._leave(generations)

    def _generations(
        self, job: Job, interval: float, sink: Callable[[Generation], None]
    ) -> Iterator[Generation]:
        request, stop = job.request, job.request.stop or []
        texts = [stop] if isinstance(stop, str) else stop
        for index, prompt in enumerate(job.prompts):
            room = max(1, self._args.max_seq_len - prompt.tokens // self._args.cp)
            seed = self._seed(request, prompt)
            yield Generation(
                index=index,
                prompt=prompt,
                tokens=continue_text(prompt.text, seed, prompt.opening),
                max_tokens=room if job.max_tokens is None else min(room, job.max_tokens),
                eos_at=None if request.ignore_eos else self._eos_at(request, seed),
                interval=interval,
                sink=sink,
                stops=stops_of(texts, request.stop_token_ids or []),
                keeps_stop=request.include_stop_str_in_output,
            )

    def _seed(self, request: answers.Request, prompt: Prompt) -> int:
        """Greedy answers follow from the prompt alone, sampled ones also from seed or chance."""
        if request.temperature == 0:
            return fingerprint(prompt.text)
        chance = next(self._serial) if request.seed is None else request.seed
        return fingerprint(f"{chance} {prompt.text}")

    def _eos_at(self, request: answers.Request, seed: int) -> int:
        low, high = self._settings.output_tokens
        return max(low + seed % (high - low + 1), request.min_tokens)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _refusal(str(error.errors()))


def _refusal(message: str) -> Response:
    error = {"object": "error", "message": message, "type": "BadRequestError", "param": None}
    return JSONResponse({**error, "code": 400}, 400)
