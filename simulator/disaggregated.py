"""`trtllm-serve disaggregated`: one address in front of context and generation servers.

A request goes to a context server, which makes the first token, and then, with what that server
hands on, to a generation server. A server that dies after the start still gets its share.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import cycle
from typing import Any

import aiohttp
from answers import Json, always
from console import Fatal, log
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from handoff import CONTEXT, GENERATION
from llm_args import read_yaml_file
from protocol import ChatCompletionRequest, CompletionRequest

POLL_SECONDS, RETRY_SECONDS = 3, 1
ROUTERS = ROUND_ROBIN, _, CACHE_AWARE = ["round_robin", "load_balancing", "kv_cache_aware"]
CONTINUES = ("length", "not_finished")  # finish reasons of a context server that mean there is more


class Router:
    """Which server of a list is next: each in turn, or the one with the least to do."""

    def __init__(
        self,
        num_instances: int = 1,
        urls: list[str] | None = None,
        router: Json | None = None,
        **_: Any,  # noqa: ANN401 (YAML)
    ) -> None:
        """Without a list it waits for a server called None, as the real one does."""
        found = [(host, int(port)) for host, port in (url.split(":") for url in urls or ())]
        if found and len(found) != num_instances:
            raise ValueError(
                f"Number of hostnames ({len(found)}) should be equal to the number of instances "
                f"({num_instances})"
            )
        kind = str((router or {}).get("type", ROUND_ROBIN)).lower()
        if kind not in ROUTERS:
            raise ValueError(f"Unsupported router type: {kind}. Supported types are: {ROUTERS}")
        if kind == CACHE_AWARE:
            raise NotImplementedError(f"[simulator] the router {kind} is not simulated")
        servers = [f"http://{host}:{port}" for host, port in found]
        self.urls = servers or ["http://None:None"] * num_instances
        self._turns = cycle(self.urls) if kind == ROUND_ROBIN else None
        self._by_tokens = bool((router or {}).get("use_tokens"))
        self._load = dict.fromkeys(self.urls, 0)

    @contextmanager
    def server(self, body: Json) -> Iterator[str]:
        """A server; its load counts this request until the block ends."""
        if self._turns:
            yield next(self._turns)
            return
        load = _count_tokens(body) if self._by_tokens else 1
        url = min(self._load, key=lambda each: (self._load[each], each))
        self._load[url] += load
        try:
            yield url
        finally:
            self._load[url] -= load


def _count_tokens(body: Json) -> int:
    fits_not = "LoadBalancing router with tokens doesn't support"
    if (body.get("disaggregated_params") or {}).get("request_type") == GENERATION:
        raise ValueError(f"{fits_not} generation_only requests")
    if "prompt" not in body:
        raise ValueError(f"{fits_not} ChatCompletionRequest yet")
    return len(body["prompt"])


# -- its config file --


def read_config(flags: Mapping[str, Any], version: str) -> Json:
    if flags["metadata_server_config_file"]:
        raise Fatal("NotImplementedError", "[simulator] there is no metadata server")
    config: Json = read_yaml_file(flags["config_file"])
    if version != "1.1.0" and config.get("disagg_cluster"):
        raise Fatal("NotImplementedError", "[simulator] disagg_cluster is not simulated")
    return config


def _routers(
    context_servers: Json | None = None,
    generation_servers: Json | None = None,
    conditional_disagg_config: Json | None = None,
    **rest: Any,  # noqa: ANN401 (YAML)
) -> list[Router]:
    """Any other key belongs in both lists: the workers' own arguments once stood here."""
    lists = {"context": context_servers or {}, "generation": generation_servers or {}}
    for key, value in rest.items():
        for name, section in lists.items():
            if section.setdefault(key, value) != value:
                where = f"both in the top-level and in the {name}_servers section"
                raise ValueError(f"Parameter {key} is specified {where}, but with different values")
    if conditional_disagg_config:
        raise ValueError(
            "Generation router must be a KvCacheAwareRouter to enable conditional disaggregation"
        )
    routers = [Router(**section) for section in lists.values()]
    for name, router in reversed([*zip(lists, routers, strict=True)]):
        if not router.urls:
            raise ValueError(f"At least one {name} server must be provided")
    return routers


# -- the server --


async def invalid(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


class Orchestrator:
    """Built from its config file; errors in that are Python's own, as in the real one."""

    def __init__(
        self,
        flags: Mapping[str, Any],
        version: str,
        /,
        hostname: str = "localhost",
        port: int = 8000,
        max_retries: int = 1,
        **rest: Any,  # noqa: ANN401 (YAML)
    ) -> None:
        self.hostname, self.port = hostname, port
        self._flags = flags
        self._retries = max_retries
        self._contexts, self._generations = _routers(**rest)
        if max_retries < 0:
            raise ValueError(f"Max retries {max_retries} must be greater than or equal to 0")
        self.app = FastAPI(lifespan=self._lifespan, strict_content_type=False)
        self.app.add_exception_handler(RequestValidationError, invalid)
        self.app.get("/health")(always(Response()))  # without a look at the servers
        self.app.get("/version")(always(JSONResponse({"version": version})))
        self.app.get("/perf_metrics")(always(JSONResponse([])))
        self.app.get("/cluster_info")(always(JSONResponse({})))
        self.app.post("/v1/completions")(self.completions)
        self.app.post("/v1/chat/completions")(self.chat)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """uvicorn opens the port once all servers are ready, and not at all if they are late."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self._flags["request_timeout"])
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            log("I", "Waiting for context and generation servers to be ready")
            await asyncio.wait_for(self._all_ready(), self._flags["server_start_timeout"])
            log("I", "Context and generation servers are ready")
            yield

    async def _all_ready(self) -> None:
        urls, turn = [*self._contexts.urls, *self._generations.urls], 0
        while urls := [url for url in await asyncio.gather(*map(self._if_missing, urls)) if url]:
            log("I", f"[{turn}] Servers are not ready. Waiting for {urls}...")
            await asyncio.sleep(POLL_SECONDS)
            turn += 1

    async def _if_missing(self, url: str) -> str | None:
        try:
            async with self._session.get(f"{url}/health") as answer:
                return None if answer.status == 200 else url
        except Exception:
            return url

    # -- generation --

    async def completions(self, request: CompletionRequest, raw: Request) -> Response:
        return await self._answer("/v1/completions", await raw.json())

    async def chat(self, request: ChatCompletionRequest, raw: Request) -> Response:
        return await self._answer("/v1/chat/completions", await raw.json())

    async def _answer(self, path: str, body: Json) -> Response:
        try:
            if "prompt" in body:
                body["prompt"] = _one_prompt(body["prompt"])
            context = await self._prefill(path, body)
            choice = context["choices"][0]
            handed_on = choice.pop("disaggregated_params")
            body["disaggregated_params"] = {**handed_on, "request_type": GENERATION}
            ids = "prompt" if "prompt" in body else "prompt_token_ids"
            body[ids] = context["prompt_token_ids"]
            more = choice["finish_reason"] in CONTINUES
            with ExitStack() as held:
                server = held.enter_context(self._generations.server(body))
                if body.get("stream"):
                    events = self._events(held.pop_all(), server + path, body if more else None)
                    return StreamingResponse(events, media_type="text/event-stream")
                return JSONResponse(await self._ask(server + path, body) if more else context)
        except HTTPException:
            raise
        except Exception as error:
            log("E", f"{type(error).__name__}: {error}")
            raise HTTPException(500, f"Internal server error {error}") from None

    async def _prefill(self, path: str, body: Json) -> Json:
        only = {"disaggregated_params": {"request_type": CONTEXT}}
        asked = {**body, **only, "stream": False, "stream_options": None}
        with self._contexts.server(asked) as server:
            context = await self._ask(server + path, asked)
        if context["choices"][0]["disaggregated_params"] is None:
            raise ValueError("Context server did not return disaggregated params")
        return context

    async def _ask(self, url: str, body: Json) -> Json:
        """A whole answer. After an error of the connection the same server is asked again."""
        for attempt in range(self._retries + 1):
            try:
                async with self._session.post(url, json=body) as response:
                    answer: Json = await response.json()
                    if not response.ok:
                        log("E", f"Received failed response {answer}")
                    response.raise_for_status()
                    return answer
            except (aiohttp.ClientError, OSError) as error:  # a timeout is one of these
                if attempt < self._retries:
                    log("E", f"Client error: {error} - retry {attempt} of {self._retries}")
                    await asyncio.sleep(RETRY_SECONDS)
        raise HTTPException(500, "Internal server error")

    async def _events(self, held: ExitStack, url: str, body: Json | None) -> AsyncIterator[bytes]:
        """Pass a stream on as it comes. It has begun, so that an error can only cut it."""
        with held:
            if body is None:
                yield b"data: [DONE]\n\n"
                return
            async with self._session.post(url, json=body) as answer:
                if answer.content_type != "text/event-stream":
                    raise RuntimeError("async generator raised StopAsyncIteration")
                async for block in answer.content.iter_any():
                    yield block


def _one_prompt(prompt: Any) -> Any:  # noqa: ANN401 (one of four forms)
    """The prompt; one that is alone in a list is taken out, be it a text or a token id."""
    if isinstance(prompt, list) and len(prompt) == 1:
        return prompt[0]
    if not isinstance(prompt, str) and not all(isinstance(each, int) for each in prompt):
        raise ValueError(
            "Disaggregated server currently only supports single string prompt or list of "
            "integers in request"
        )
    return prompt
