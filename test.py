#!/usr/bin/env python3
"""Smoke-test the OpenAI API of a running server: eight checks, a line each, exit
0 if all pass.

It asks for nothing that only one engine knows, so vLLM and SGLang servers can
be tested too, and for nothing known to bring TensorRT-LLM down (max_tokens 0,
top_k -1, logprobs, long prompts).

Without -H and -p the server is the one in logs/endpoint.json, where the
launcher leaves that (here or in $WORKSPACE). Flags come before the
environment's PORT, MODEL, OPENAI_API_KEY, and that before .env. HOST counts
from .env only.

examples:
  test.py -H 10.0.128.193 -p 8000
  test.py -H https://llm.example.com -m Qwen/Qwen2.5-14B-Instruct --json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0  # an address that drops packets is told apart from a slow engine
MAX_BODY = 1 << 20  # no honest answer to these requests comes near
SHOWN = 500  # characters of a wrong answer that are worth reading

ADVICE = "Is it up? `make status` shows what runs; -H and -p name another."

Facts = dict[str, Any]


class Wrong(Exception):
    """A check failed; the text says why in one sentence."""


class Trouble(Exception):
    """Nothing could be checked; the text says why in one sentence."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class Answer:
    status: int = 0  # 0: nothing came that was HTTP
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    stamps: list[tuple[int, float]] = field(default_factory=list)  # (length of body, ms)
    broken: str = ""  # why no more came
    ms: float = 0.0


# ---- Predicates: they take an answer and its request, and return facts or raise Wrong.

HINTS = {401: ": set OPENAI_API_KEY", 404: ": no such path or model", 503: ": loading, or dead"}


def is_ok(answer: Answer, ask: Facts) -> Facts:
    if answer.broken:
        raise Wrong(answer.broken)
    if answer.status != 200:
        raise Wrong(f"status {answer.status} instead of 200{HINTS.get(answer.status, '')}")
    return {"detail": ""}  # trtllm-serve's /health has an empty body, others' do not


def lists_model(answer: Answer, ask: Facts) -> Facts:
    """An engine echoes whatever name a request carries: only this list tells what it serves."""
    is_ok(answer, ask)
    ids = [model.get("id") for model in objects(parse(answer.body), "data")]
    names = [name for name in ids if isinstance(name, str) and name]
    if not names or names != ids:
        raise Wrong("the list holds no model, or one without an id")
    for name in served_as(ask["model"]) if ask["model"] else names:
        if name in names:
            return {"detail": name, "model": name}
    raise Wrong(f"{ask['model']} was asked for, but the server has {', '.join(names[:5])}")


def served_as(model: str) -> list[str]:
    """TensorRT-LLM serves a directory under its last part, vLLM and SGLang under its path."""
    is_path = model.startswith(("/", ".", "~")) or os.path.isdir(model)  # noqa: PTH112  never raises
    return [model, PurePath(model).name] if is_path else [model]


def generates(answer: Answer, ask: Facts) -> Facts:
    is_ok(answer, ask)
    return judge(parse(answer.body), ask)


def streams(answer: Answer, ask: Facts) -> Facts:
    is_ok(answer, ask)
    if not answer.content_type.lower().startswith("text/event-stream"):
        raise Wrong(f"the content type is {answer.content_type!r} instead of text/event-stream")
    events = list(re.finditer(rb"^data:(.*)$", answer.body, re.MULTILINE))
    if not events or events.pop()[1].strip() != b"[DONE]":
        raise Wrong("the stream does not end with [DONE]")
    if len(events) < 2:
        raise Wrong(f"{len(events)} event is not a stream")
    chunks = [parse(event[1]) for event in events]
    detail = judge(whole(chunks), ask)["detail"]
    spoken = next(i for i, chunk in enumerate(chunks) if words(chunk))
    ttft = next(ms for length, ms in answer.stamps if length > events[spoken].start())
    return {"detail": f"TTFT {ttft:.1f} ms, {detail}", "ttft_ms": round(ttft, 1)}


def words(chunk: object) -> str:
    return "".join(text_of(choice, "delta") for choice in objects(chunk, "choices"))


def whole(chunks: list[Any]) -> Facts:
    """The reply that the stream was cut from."""
    text = "".join(map(words, chunks))
    ends = [choice.get("finish_reason") for chunk in chunks for choice in chunk["choices"]]
    end = next(filter(None, reversed(ends)), None)
    usage = next(filter(None, (chunk.get("usage") for chunk in reversed(chunks))), None)
    choice = {"index": 0, "message": {"content": text}, "finish_reason": end}
    return {"choices": [choice], "usage": usage}


def judge(reply: object, ask: Facts) -> Facts:
    """A text for each prompt, an end for each text, and counts that add up."""
    count = len(ask["prompt"]) if isinstance(ask.get("prompt"), list) else 1
    choices = objects(reply, "choices")
    indices = [choice.get("index") for choice in choices]
    if len(choices) != count or any(i not in indices for i in range(count)):
        raise Wrong(f"the choices' indices are {indices} instead of {list(range(count))}")
    for choice in choices:
        judge_choice(choice, ask)
    return {"detail": f"{completion_tokens(reply, count * ask['max_tokens'])} tokens"}


def judge_choice(choice: Facts, ask: Facts) -> None:
    text = text_of(choice, "message" if "messages" in ask else "")
    end, stop = choice.get("finish_reason"), ask.get("stop")
    if end not in ("stop", "length"):
        raise Wrong(f"finish_reason is {end!r} instead of 'stop' or 'length'")
    if not text.strip() and not (stop and end == "stop"):
        raise Wrong("the text is empty")
    if stop and stop in text:
        raise Wrong(f"the text runs on past the stop sequence {stop!r}")


def completion_tokens(reply: object, limit: int) -> int:
    match reply:
        case {"usage": {"prompt_tokens": int(p), "completion_tokens": int(c), "total_tokens": t}}:
            if p > 0 and 0 < c <= limit and p + c == t:
                return c
            raise Wrong(f"usage: {p} prompt + {c} completion = {t} tokens, with {limit} allowed")
    raise Wrong("usage is missing, or not three numbers")


def text_of(choice: Facts, key: str) -> str:
    """Chat has it under `message`, or `delta` in a stream; a completion in the choice itself."""
    part = choice.get(key) if key else choice
    # A reasoning model may spend all its tokens before the first word of content.
    keys = ("content", "reasoning_content", "reasoning") if key else ("text",)
    found = [part.get(key) for key in keys] if isinstance(part, dict) else []
    return "".join(text for text in found if isinstance(text, str))


def objects(reply: object, key: str) -> list[Facts]:
    found = reply.get(key) if isinstance(reply, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Wrong(f"the answer has no list of objects under {key!r}")
    return found


def parse(text: bytes | bytearray) -> object:
    try:
        return json.loads(text.decode(), parse_constant=int)  # int("NaN") is an error
    except (ValueError, RecursionError) as e:
        raise Wrong(f"this is not JSON: {e}") from e


# ---- The checks.


class Check(NamedTuple):
    name: str
    path: str
    body: Facts  # empty: GET; the model's name is added when it is sent
    predicate: Callable[[Answer, Facts], Facts]


COUNT = "Count on: 1, 2, 3, 4, 5,"  # any model goes on with a number and a comma
CHAT = [{"role": "user", "content": "Count from one to twenty in words."}]

# fmt: off
CHECKS = (
    Check("health", "/health", {}, is_ok),
    Check("list models", "/v1/models", {}, lists_model),
    Check("completions", "/v1/completions",
          {"prompt": COUNT, "max_tokens": 16, "temperature": 0}, generates),
    Check("chat", "/v1/chat/completions",
          {"messages": CHAT, "max_tokens": 32, "temperature": 0}, generates),
    Check("sampling parameters", "/v1/completions",
          {"prompt": "Once upon a time", "max_tokens": 16,
           "temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 42}, generates),
    Check("streaming", "/v1/chat/completions",
          {"messages": CHAT, "max_tokens": 32, "temperature": 0,
           "stream": True, "stream_options": {"include_usage": True}}, streams),
    # TensorRT-LLM looks for the stop sequence's own tokens, and a comma is hardly ever merged.
    Check("stop sequences", "/v1/completions",
          {"prompt": COUNT, "max_tokens": 32, "temperature": 0, "stop": ","}, generates),
    Check("batch", "/v1/completions",
          {"prompt": ["The capital of France is", "The capital of Japan is"],
           "max_tokens": 8, "temperature": 0}, generates),
)
# fmt: on


# ---- Which server.


class Target(NamedTuple):
    url: str
    model: str = ""  # empty: whatever the server lists first
    file: str = ""  # that named it


def settings() -> dict[str, str]:
    """The environment, over .env here, over .env next to this script."""
    found: dict[str, str | None] = {}
    try:
        from dotenv import dotenv_values

        for path in (Path(__file__).resolve().with_name(".env"), Path(".env")):
            check_owner(path, "it would say who gets the key: make it your own")
            found |= dotenv_values(path)
    except ImportError:
        pass
    except (OSError, ValueError) as e:
        raise Trouble(f".env cannot be read: {e}", code=1) from e
    # Not HOST: conda's compilers export HOST=x86_64-conda-linux-gnu, tcsh the client's own name.
    found |= {name: value for name, value in os.environ.items() if name != "HOST" and value}
    return {name: value for name, value in found.items() if value}


def check_owner(path: Path, why: str) -> None:
    """What others may have written could send our key to them."""
    if path.is_file():
        state, ours = path.stat(), {os.geteuid(), 0, Path(__file__).stat().st_uid}
        if state.st_uid not in ours or state.st_mode & stat.S_IWOTH:
            whose = "somebody else's, or everybody may write it"
            raise Trouble(f"{path} is {whose}, and {why}", code=1)


def find_target(args: argparse.Namespace, env: dict[str, str]) -> Target:
    host = args.host or env.get("HOST", "")
    # A URL on the command line is complete: PORT was meant for something else.
    port = port_number(args.port or ("" if "://" in args.host else env.get("PORT", "")))
    model = args.model or env.get("MODEL", "")
    left = None if host else left_by_launcher(env.get("WORKSPACE", ""))
    # PORT of the environment is the launcher's own setting: it hides no record.
    if left and port_number(args.port) in (0, urlsplit(left.url).port):
        return left._replace(model=args.model or left.model)
    url = base_url(host or "localhost", port)
    if args.port and urlsplit(url).port != port:
        raise Trouble(f"{host!r} and -p {port} name two ports: which one?")
    return Target(url, model)


def port_number(text: str) -> int:
    if text and not (re.fullmatch("[0-9]{1,5}", text) and 0 < int(text) < 65536):
        raise Trouble(f"{text!r} is no port: 1 to 65535")
    return int(text or 0)


def left_by_launcher(workspace: str) -> Target | None:
    for path in (Path(workspace, "logs/endpoint.json"), Path("logs/endpoint.json")):
        try:
            if path.is_file():
                match json.loads(path.read_text(encoding="utf-8")):
                    case {"url": str(url), **rest}:
                        return Target(base_url(url, 0), str(rest.get("model") or ""), str(path))
                raise Trouble("there is no url in it")
        except (OSError, ValueError, RecursionError, Trouble) as e:
            advice = "remove it, or name the server with -H and -p"
            raise Trouble(f"{path} does not name a server ({e}): {advice}", code=1) from e
    return None


def base_url(host: str, port: int) -> str:
    """What to put /v1/... behind, from a name, an address, HOST:PORT or a whole URL."""
    complete = "://" in host
    if host.count(":") > 1 and not complete and "[" not in host:
        host = f"[{host}]"  # a bare IPv6 address
    try:
        url = urlsplit(host if complete else f"http://{host}")
        own = url.port
    except ValueError as e:
        raise Trouble(f"{host!r} is neither a host nor a URL: {e}") from e
    odd = url.scheme not in ("http", "https") or not url.hostname or own == 0
    if odd or re.search(r"[\s@?#\\]", host) or not host.isprintable():
        raise Trouble(f"{host!r} is neither a host nor an http(s) URL (without login or query)")
    tail = f":{port or 8000}" if not own and (port or not complete) else ""
    path = url.path.rstrip("/").removesuffix("/v1")
    return f"{url.scheme}://{url.netloc.rstrip(':')}{tail}{path}"


# ---- One exchange.

CAUSES = {  # by name: importing ssl, socket and http.client for the classes costs time
    "gaierror": "no such host name",
    "ConnectionRefusedError": "connection refused",
    "TimeoutError": "timed out",
    "ConnectTimeoutError": "timed out while connecting",
    "RemoteDisconnected": "the connection was closed without an answer",
    "ConnectionResetError": "the connection was reset",
    "BadStatusLine": "what came is not HTTP",
    "ValueError": "what came is not HTTP",  # a status or a chunk size that is no number
    "LineTooLong": "a line of the answer does not end",
    "IncompleteRead": "the answer broke off",
}


def cause(error: BaseException) -> str:
    """The innermost error: requests and urllib3 wrap it in two or three of their own."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    name = type(error).__name__
    return CAUSES.get(name, str(error) if name == "Wrong" else f"{name}: {error}")


class Server(NamedTuple):
    url: str
    key: str
    seconds: float  # for one whole request
    ca_bundle: str

    def curl(self, path: str, body: Facts) -> str:
        """The request to paste: the shell fills in the key; no proxy, as here."""
        auth = '-H "Authorization: Bearer $OPENAI_API_KEY" ' if self.key else ""
        data = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
        return f"curl -isSN --noproxy '*' {auth}{shlex.join([self.url + path, *data])}"

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def fetch(self, path: str, body: Facts) -> Answer:
        """The answer, or what there is of it when time is over.

        In a thread, because the library's timeout is for each read: a server that sends a byte a
        second, or "100 Continue" over and over, would hold it for ever.
        """
        answer, start = Answer(), time.perf_counter()
        reader = threading.Thread(
            target=self.converse, args=(path, body, answer, start), daemon=True
        )
        reader.start()
        reader.join(self.seconds)
        if not reader.is_alive():
            return answer
        broken = f"the answer did not {'end' if answer.status else 'begin'} in {self.seconds:g} s"
        return replace(answer, broken=broken, ms=self.seconds * 1000)

    def converse(self, path: str, body: Facts, answer: Answer, start: float) -> None:
        try:
            for block in self.send(path, body, answer):
                answer.body += block
                answer.stamps.append((len(answer.body), (time.perf_counter() - start) * 1000))
                if len(answer.body) > MAX_BODY or time.perf_counter() - start > self.seconds:
                    raise Wrong("the answer does not end")
        except Exception as e:  # urllib3 and http.client let a dozen unrelated kinds through
            answer.broken = cause(e)
        answer.ms = (time.perf_counter() - start) * 1000

    def send(self, path: str, body: Facts, answer: Answer) -> Iterator[bytes]:
        """One request, by the adapter itself; what comes, as it comes.

        A Session with trust_env would bring proxies, which cannot reach a private node or answer
        in its stead, and ~/.netrc, which replaces our key. And any Session reads the whole body
        of a redirect, however long, even when told not to follow it.
        """
        import requests.adapters

        method, content = ("POST", body) if body else ("GET", None)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        ask = requests.Request(method, self.url + path, headers, json=content).prepare()
        limits = (min(CONNECT_SECONDS, self.seconds), self.seconds)
        verify = self.ca_bundle or True
        with (
            closing(requests.adapters.HTTPAdapter()) as adapter,
            adapter.send(ask, stream=True, timeout=limits, verify=verify) as response,
        ):
            answer.status = response.status_code
            answer.content_type = response.headers.get("Content-Type", "")
            if response.is_redirect:
                raise Wrong(f"redirected to {response.headers['Location']}: not followed")
            # 64 bytes are less than an event, so none waits for the next one; raw, so that
            # nothing is unpacked: compression was not asked for.
            yield from iter(lambda: response.raw.read(64), b"")


# ---- The run.


def run_all(server: Server, target: Target) -> Iterator[Facts]:
    model, reachable = target.model, True
    for check in CHECKS:
        # Without a name, "default": TensorRT-LLM takes any, and SGLang knows its model by it.
        body = {"model": model or "default", **check.body} if check.body else {}
        result: Facts = {"name": check.name, "ok": None, "ms": None, "ttft_ms": None}
        result |= {"detail": "not run", "curl": server.curl(check.path, body)}
        result |= {"status": None, "answer": None}  # the answer of a failed check, shortened
        if reachable:
            result |= run(check, server, body or {"model": model})
        if check.path == "/health" and not result["status"]:
            reachable = False
            leftover = f" {target.file} names it: a leftover?" if target.file else ""
            result["detail"] += f": no server at {server.url}. {ADVICE}{leftover}"
        model = result.pop("model", model)  # from here on as the server calls it
        yield result


def run(check: Check, server: Server, ask: Facts) -> Facts:
    answer = server.fetch(check.path, ask if check.body else {})
    result = {"ms": round(answer.ms, 1), "status": answer.status or None}
    try:
        return result | {"ok": True} | check.predicate(answer, ask)
    except Wrong as wrong:
        body = answer.body[: 8 * SHOWN].decode(errors="replace")
        detail, text = (server.without_key(text)[:SHOWN] for text in (str(wrong), body))
        return result | {"ok": False, "detail": detail, "answer": text}


def show(result: Facts, out: TextIO) -> None:
    word, code = {True: ("ok", 32), False: ("FAIL", 31), None: ("-", 2)}[result["ok"]]
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    mark = f"\033[{code}m{word:<4}\033[0m" if colour else f"{word:<4}"
    ms = "" if result["ms"] is None else f"{result['ms']:.1f} ms"
    line = f"  {mark}  {result['name']:<19} {ms:>11}  {printable(result['detail'])[:SHOWN]}"
    print(line.rstrip(), file=out, flush=True)
    if result["ok"] is False:
        print(f"        $ {result['curl']}", file=out)
    if result["ok"] is False and result["status"]:
        print(f"        {result['status']} {printable(result['answer'])}".rstrip(), file=out)


def printable(text: str) -> str:
    """On one line, and unable to drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def api_key(env: dict[str, str]) -> str:
    """For vLLM's --api-key. Checked here: the HTTP library's complaint would print it."""
    key = env.get("OPENAI_API_KEY", "")
    if not re.fullmatch("[!-~]*", key):
        raise Trouble("OPENAI_API_KEY has characters that no HTTP header can carry")
    return key


def smoke(args: argparse.Namespace) -> int:
    try:
        import requests.adapters  # noqa: F401  late, for --help; here, before any clock runs
    except ImportError as e:
        raise Trouble(f"{e}: `make setup`, or pip install requests", code=1) from e
    env = settings()
    target = find_target(args, env)
    # requests reads these itself, but in a Session.
    bundle = env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE", "")
    key = api_key(env)
    if key and target.file:
        check_owner(Path(target.file), "OPENAI_API_KEY is not sent there: -H, -p name a server")
    server = Server(target.url, key, args.timeout, bundle)
    out = sys.stderr if args.json else sys.stdout
    if isinstance(out, TextIOWrapper):
        out.reconfigure(errors="backslashreplace")  # a model's text, an ASCII locale

    source = f", from {printable(target.file)}" if target.file else ""
    print(f"Testing {target.url}{source}", file=out)
    results = []
    for result in run_all(server, target):
        show(result, out)
        results.append(result)
    passed = sum(result["ok"] is True for result in results)
    print(f"{passed}/{len(results)} passed", file=out)
    if args.json:
        print(json.dumps({"url": target.url, "passed": passed, "checks": results}, indent=2))
    sys.stdout.flush()
    return 0 if passed == len(results) else 1


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError("more than 0, at most 86400")
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n\nexamples:\n")
    parser = argparse.ArgumentParser(
        usage="test.py [-H HOST] [-p PORT] [-m MODEL] [--json] [--timeout SECONDS]",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("server").add_argument
    add("-H", "--host", default="", help="name, address or URL (default: localhost)")
    add("-p", "--port", default="", help="(default: 8000)")
    add("-m", "--model", default="", help="must be served there (default: the first that is)")
    add = parser.add_argument_group("run").add_argument
    add("--timeout", type=seconds, default=60.0, metavar="SECONDS",
        help="for one whole request (default: %(default)g)")
    add("--json", action="store_true", help="one JSON document on stdout, the lines on stderr")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return smoke(args)
    except Trouble as trouble:
        print(f"test.py: {printable(str(trouble))}", file=sys.stderr)
        return trouble.code
    except KeyboardInterrupt:
        print("test.py: interrupted", file=sys.stderr)
        return 130
    except OSError as e:  # stdout: `| head`, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"test.py: the results could not be written: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
