"""The routes of the OpenAI-compatible server, and how a request becomes an answer."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Annotated, Any

import answers
from answers import Json, always
from console import log
from cost import Cost
from engine import Engine, Generation, stops_of
from environment import Settings
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from faults import Faults
from handoff import CONTEXT, GENERATION, kind_of, state_of, taken_over
from limits import RequestError, check_engine, check_request
from llm_args import LlmArgs
from protocol import AnyRequest, ChatCompletionRequest, CompletionRequest, ResponsesRequest
from starlette.types import ASGIApp, Receive, Scope, Send
from words import Prompt, continue_text, fingerprint, prompts_of

QUEUE_PATIENCE = 2.0  # seconds to wait while the queue of statistics is empty
OWNER = "tensorrt_llm_simulator"
Sink = Callable[[Generation], None]


def refusal(message: str) -> Response:
    error = {"object": "error", "message": message, "type": "BadRequestError", "param": None}
    return JSONResponse({**error, "code": 400}, 400)


async def invalid(_: Request, error: Any) -> Response:  # noqa: ANN401 (as FastAPI calls it)
    return refusal(str(error.errors()))


class Api:
    def __init__(
        self, args: LlmArgs, settings: Settings, faults: Faults, cost: Cost | None = None
    ) -> None:
        self._args = args
        self._settings = settings
        self._engine = Engine(settings, faults, args.max_batch_size, cost)
        self._faults = faults
        self._zero_token_requests = 0
        self._serial = count()  # makes sampled answers differ
        # Since 0.132 FastAPI refuses a body without a content type, unless told not to.
        self._app = FastAPI(strict_content_type=False)
        self._app.add_exception_handler(RequestValidationError, invalid)
        get, post = self._app.get, self._app.post
        get("/version")(always(JSONResponse({"version": settings.version})))
        get("/perf_metrics")(always(JSONResponse([])))
        for name in ("health", "health_generate", "metrics"):
            get(f"/{name}")(getattr(self, name))
        get("/v1/models")(self.models)
        get("/steady_clock_offset")(self.clock_offset)
        post("/steady_clock_offset")(self.set_clock_offset)
        post("/kv_cache_events")(self.metrics)
        post("/v1/completions")(self.completions)
        post("/v1/chat/completions")(self.chat)
        post("/v1/responses")(self.responses)
        if args.prometheus:
            nothing = Response("", media_type="text/plain; version=0.0.4")
            get("/prometheus/metrics")(always(nothing))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if not self._faults.hung or scope["type"] != "http":
            return await app(scope, receive, send)
        while (await receive())["type"] != "http.disconnect":
            pass

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

    async def models(self) -> Response:
        card = {"id": self._args.served_name, "object": "model", "created": int(time.time())}
        return JSONResponse({"object": "list", "data": [{**card, "owned_by": OWNER}]})

    async def metrics(self) -> Response:
        """A list of iterations that each reading empties; [] unless the YAML asks for it."""
        if self._args.iter_stats and self._engine.iterations:
            steps = [*self._engine.iterations]
            self._engine.iterations.clear()
            return JSONResponse(steps)
        await asyncio.sleep(QUEUE_PATIENCE if self._engine.submitted else 0)
        return JSONResponse([])

    async def clock_offset(self) -> Response:
        received = time.monotonic()
        await asyncio.sleep(0.2)
        return JSONResponse({"receive_ts": received, "transmit_ts": time.monotonic()})

    async def set_clock_offset(self, offset: Annotated[float, Body(embed=True)]) -> Response:
        log("I", f"The steady clock offset between local and disagg server: {offset} second")
        return Response()

    async def responses(self, request: ResponsesRequest) -> Response:
        return refusal("Responses API only supports harmony format for now")

    # -- generation --

    async def completions(self, request: CompletionRequest, raw: Request) -> Response:
        return await self._answer(request, raw)

    async def chat(self, request: ChatCompletionRequest, raw: Request) -> Response:
        return await self._answer(request, raw)

    async def _answer(self, request: AnyRequest, raw: Request) -> Response:
        """The server's own refusal is an answer; a worker's comes too late, and cuts a stream."""
        try:
            if self._faults.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            prompts = prompts_of(request)
            check_request(request, prompts, self._args)
            if request.stream:
                events = self._stream(request, prompts)
                return StreamingResponse(events, media_type="text/event-stream")
            return JSONResponse(await self._whole(request, prompts, raw))
        except Exception as error:
            return refusal(str(error))

    async def _whole(self, request: AnyRequest, prompts: list[Prompt], raw: Request) -> Json:
        """Return the answer once it is whole, or early if nobody waits for it any more."""
        over = asyncio.Event()

        def take(_: Generation) -> None:
            if all(each.finish_reason for each in generations):
                over.set()

        async with self._running(request, prompts, math.inf, take) as generations:
            gone = asyncio.ensure_future(raw.receive())
            gone.add_done_callback(lambda _: over.set())
            try:
                await over.wait()
            finally:
                gone.cancel()
        return answers.whole(request, self._args.served_name, generations)

    async def _stream(self, request: AnyRequest, prompts: list[Prompt]) -> AsyncIterator[bytes]:
        queue = asyncio.Queue[bytes | Exception]()

        def take(generation: Generation) -> None:
            try:
                for event in answers.events(request, generation):
                    queue.put_nowait(event)
            except Exception as error:
                queue.put_nowait(error)

        interval = self._args.stream_interval
        async with self._running(request, prompts, interval, take) as generations:
            while not queue.empty() or not all(each.finish_reason for each in generations):
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                yield event
            yield b"data: [DONE]\n\n"

    @asynccontextmanager
    async def _running(
        self, request: AnyRequest, prompts: list[Prompt], interval: float, sink: Sink
    ) -> AsyncIterator[list[Generation]]:
        """What the engine has accepted; it works on that until the block ends."""
        check_engine(request, prompts, self._args)
        if request.max_tokens == 0:  # the real engine survives the first such request
            self._zero_token_requests += 1
            if self._zero_token_requests == 1:
                raise RequestError("max_tokens must be greater than 0, but got 0")
            log("E", "CppExecutorError: max_tokens 0: the executor has died, shutting down")
            for _ in range(2):  # the second cuts open connections
                signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        generations = [*self._generations(request, prompts, interval, sink)]
        try:
            self._engine.submit(generations)
            yield generations
        finally:
            self._engine.cancel(generations)

    def _generations(
        self, request: AnyRequest, prompts: list[Prompt], interval: float, sink: Sink
    ) -> Iterator[Generation]:
        stop, kind = request.stop or [], kind_of(request)
        texts = [stop] if isinstance(stop, str) else stop
        limit = 1 if kind == CONTEXT else request.max_tokens
        for index, prompt in enumerate(prompts):
            room = max(1, self._args.max_seq_len - prompt.tokens // self._args.cp)
            seed = self._seed(request, prompt)
            if kind == GENERATION:
                seed, text, opening = taken_over(request.disaggregated_params, self._args)
                prompt = prompt._replace(text=text, opening=opening)
            low, high = self._settings.output_tokens
            end = max(low + seed % (high - low + 1), request.min_tokens)
            yield Generation(
                index=index,
                prompt=prompt,
                tokens=continue_text(prompt.text, seed, prompt.opening),
                max_tokens=room if limit is None else min(room, limit),
                eos_at=None if request.ignore_eos else end,
                interval=interval,
                sink=sink,
                stops=stops_of(texts, request.stop_token_ids or []),
                keeps_stop=request.include_stop_str_in_output,
                prefilled=kind == GENERATION,
                state=state_of(prompt, seed, self._args) if kind == CONTEXT else "",
            )

    def _seed(self, request: AnyRequest, prompt: Prompt) -> int:
        """Greedy answers follow from the prompt alone, sampled ones also from seed or chance."""
        chance = next(self._serial) if request.seed is None else request.seed
        greedy = request.temperature == 0
        return fingerprint(prompt.text if greedy else f"{chance} {prompt.text}")
