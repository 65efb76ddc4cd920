#!/usr/bin/env python3
"""Smoke-test a server's OpenAI API: eight checks; exit 0 if all pass.

It asks for nothing known to bring TensorRT-LLM down (as top_k -1 does).
It leaves out what another server lacks or refuses (top_k), and says so.
It looks for logs/endpoint.json here and in $WORKSPACE. A flag wins over PORT,
MODEL, OPENAI_API_KEY in the environment, that over .env; HOST: only in .env.
  test.py -H 10.0.128.193 -p 8000
  test.py -H https://llm.example.com -m Qwen/Qwen2.5-14B-Instruct --json
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shlex
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import StringIO, TextIOWrapper
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0  # tells an address that drops packets from a slow engine
READ, MAX_BODY = 1 << 16, 1 << 23  # a list of a thousand models takes 1 MB
EVENT = re.compile(rb"(?:[^\r\n]+(?:\r\n|[\r\n]|\Z))+")  # what blank lines separate
DATA = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|[\r\n])(?:data:[ \t]?){1,2}(?![ \t]*\[DONE)([^\r\n]*)")
PARTS = re.compile(r'"text": "([^"]+)')  # texts of a content that is a list, as Mistral's
DECIMAL = re.compile(rb'(_tokens"\s*:\s*\d+)\.0\b')  # some write 8.0
DONE = re.compile(rb"(?:\A|[\r\n])(?:data: ?){1,2}\[DONE\]")  # some gateways wrap it twice
BUFFERED_MS = 100.0  # an engine this slow to the first token also takes time for the others
ABORTED, CUT_OFF = "(?i)^$|error|abort|cancel|timeout|fail|insufficient", ("length", "max_tokens")
SHOWN = 500  # characters of a wrong answer that are worth reading
Facts = dict[str, Any]


class Wrong(Exception):
    """A check failed; the text says why in one sentence."""


class Trouble(Exception):
    """Nothing could be checked. Arguments: why, in one sentence, and an exit code if not 2."""


@dataclass
class Answer:
    status: int = 0  # 0: no HTTP answer came
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    stamps: list[tuple[int, float]] = field(default_factory=list)  # (length of body, ms)
    broken: str = ""  # why no more came
    ms: float = 0.0


HINTS = {401: ": set OPENAI_API_KEY", 404: ": not there", 503: ": loading, or dead"}
# Fields that a strict server may refuse by name, and what is sent instead.
SPARE = {"top_k": "", "seed": "", "stream_options": "", "temperature": "",
         "max_tokens": "max_completion_tokens"}  # fmt: skip


def is_ok(answer: Answer, ask: Facts) -> Facts:
    if answer.broken or answer.status not in range(200, 204):  # some answer 201 Created
        status = f"status {answer.status} instead of 200{HINTS.get(answer.status, '')}"
        raise Wrong(answer.broken or status)
    return {"detail": ""}  # trtllm-serve's /health has an empty body, others' do not


def lists_model(answer: Answer, ask: Facts) -> Facts:
    """Engines echo any name that a request carries: only this list tells what they serve."""
    is_ok(answer, ask)
    reply = parse(answer.body)  # some call it `models`, send the bare array, or only names
    found = (reply.get("models") or reply.get("data")) if isinstance(reply, dict) else reply
    listed = found if isinstance(found, list) else []
    cards = objects({"data": [{"id": c} if isinstance(c, str) else c for c in listed]}, "data")
    names: list[Any] = [card.get("id") or card.get("name") or card.get("model") for card in cards]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise Wrong("the list holds no model, or one without an id")
    known = "|".join(re.escape(name).replace(r"\*", ".+") for name in names)  # LiteLLM's openai/*
    for name in served_as(ask["model"]) if ask["model"] else (n for n in names if "*" not in n):
        if re.fullmatch(known, name) or name.rpartition(":")[0] in names:  # OpenRouter's X:nitro
            return {"detail": name, "model": name}
    why = f"{ask['model']} was asked for, but" if ask["model"] else "-m has to name the model, as"
    raise Wrong(f"{why} the server has {', '.join(names[:5])}")


def served_as(model: str) -> list[str]:
    """Names a model may have: TensorRT-LLM serves a directory under its last part, Ollama a tag."""
    is_path = model.startswith(("/", ".", "~")) or os.path.isdir(model)  # noqa: PTH112  never raises
    return [model, *([PurePath(model).name] if is_path else [f"{model}:latest", f"models/{model}"])]


def generates(answer: Answer, ask: Facts) -> Facts:
    if b"only supports single string prompt" in answer.body:  # disaggregated TensorRT-LLM's limit
        return {"detail": "the server takes one prompt per request"}
    return is_ok(answer, ask) and judge(parse(answer.body), ask)


def streams(answer: Answer, ask: Facts) -> Facts:
    is_ok(answer, ask)
    if not answer.content_type.lower().startswith("text/event-stream"):
        raise Wrong(f"the content type is {answer.content_type!r} instead of text/event-stream")
    done = DONE.search(answer.body)
    said = [(e.end(), b"\n".join(DATA.findall(e[0])).strip()) for e in EVENT.finditer(answer.body)]
    said = [(end, data) for end, data in said if data[:1] == b"{"]  # the others are heartbeats
    chunks = [parse(data) for _, data in said]
    for chunk in chunks or ([parse(answer.body)] if answer.body.startswith(b"{") else []):
        if isinstance(chunk, dict) and chunk.get("error"):
            raise Wrong(f"there is an error in the stream: {json.dumps(chunk['error'])}")
    if len(chunks) < 2:
        raise Wrong(f"{len(chunks)} event is not a stream")
    detail = judge(whole(chunks), ask)["detail"] + ("" if done else ", but no [DONE] at the end")
    ends = [end for (end, _), chunk in zip(said, chunks, strict=True) if words(chunk)] or [0]
    came = [next(ms for length, ms in answer.stamps if length >= end) for end in ends]
    ttft = round(came[0], 1)
    if ttft > BUFFERED_MS and len(came) > 2 and came[-1] - ttft < min(ttft / 10, 2 * len(came)):
        return {"detail": f"{detail}, all at once after {ttft} ms: buffered on its way?"}
    return {"detail": f"TTFT {ttft} ms, {detail}", "ttft_ms": ttft}


def words(chunk: object) -> str:
    return "".join(text_of(choice, "delta") for choice in objects(chunk, "choices", []))


def whole(chunks: list[Any]) -> Facts:
    """The reply that was streamed, put together; some put a usage of zeros into each chunk."""
    choices = [choice for chunk in chunks for choice in objects(chunk, "choices", [])]
    end = next(filter(None, (choice.get("finish_reason") for choice in reversed(choices))), None)
    parts = [*chunks[::-1], *choices[::-1], *(c.get("x_groq") for c in chunks)]  # Moonshot, Groq
    counts = [u for p in parts if isinstance(p, dict) and isinstance(u := p.get("usage"), dict)]
    usage = next((u for u in counts if u.get("completion_tokens")), counts[0] if counts else None)
    said = {"message": {"content": "".join(map(words, chunks))}, "finish_reason": end}
    return {"choices": [said], "usage": usage}


def judge(reply: object, ask: Facts) -> Facts:
    """A text for each prompt, an end for each text, and counts that add up."""
    count = len(ask["prompt"]) if isinstance(ask.get("prompt"), list) else 1
    choices = objects(reply, "choices")
    indices = [choice.get("index", 0 if count == 1 else None) for choice in choices]
    if len(choices) != count or any(i not in indices for i in range(count)):
        raise Wrong(f"the choices' indices are {indices} instead of {list(range(count))}")
    thoughts = re.search('"(reasoning_tokens": [1-9]|completion_tokens": 0)', json.dumps(reply))
    for choice in choices:
        judge_choice(choice, ask, thoughts is not None)
    if ask.get("stream") and "stream_options" not in ask:  # it was refused, so no usage is due
        return {"detail": "uncounted tokens"}
    limit = ask.get("max_tokens") or ask["max_completion_tokens"]
    return {"detail": f"{(n := completion_tokens(reply, count * limit))} token{'s' * (n != 1)}"}


def judge_choice(choice: Facts, ask: Facts, silent: bool) -> None:
    text = text_of(choice, "message" if "messages" in ask else "")
    end, stop = choice.get("finish_reason"), ask.get("stop")
    if not isinstance(end, str) or re.search(ABORTED, end):
        raise Wrong(f"finish_reason is {end!r} instead of 'stop' or 'length'")
    if not text.strip() and not silent and not (stop and end not in CUT_OFF):
        raise Wrong("the text is empty")
    if stop and stop in text:
        raise Wrong(f"the text runs on past the stop sequence {stop!r}")


def completion_tokens(reply: object, limit: int) -> int:
    match reply:
        case {"usage": {"prompt_tokens": int(p), "completion_tokens": int(c), "total_tokens": t}}:
            # Google counts reasoning tokens only in the total.
            if p > 0 and 0 <= c <= limit and isinstance(t, int) and p + max(c, 1) <= t:
                return c or t - p
            raise Wrong(f"usage: {p} prompt + {c} completion = {t} tokens, with {limit} allowed")
    raise Wrong("usage is missing, or not three numbers")


def text_of(choice: Facts, key: str) -> str:
    """The text: a chat's is under `message` (`delta` in a stream), a completion's in the choice."""
    part = choice.get(key) if key else choice
    # A reasoning model may spend all its tokens before the first word of content.
    keys = ("content", "reasoning_content", "reasoning", "thinking") if key else ("text",)
    said = [part.get(key) for key in keys] if isinstance(part, dict) else []
    return "".join(t if isinstance(t, str) else "".join(PARTS.findall(json.dumps(t))) for t in said)


def objects(reply: object, key: str, default: object = None) -> list[Facts]:
    found = default if not isinstance(reply, dict) or reply.get(key) is None else reply[key]
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Wrong(f"the answer has no list of objects under {key!r}")
    return found


def parse(text: bytes | bytearray) -> object:
    try:  # int("NaN") is an error
        return json.loads(DECIMAL.sub(rb"\1", text).decode("utf-8-sig"), parse_constant=int)
    except (ValueError, RecursionError) as e:
        raise Wrong(f"this is not JSON: {'gzip, unasked' if text[:1] == bytes([31]) else e}") from e


class Check(NamedTuple):
    name: str
    path: str
    body: Facts  # empty: GET; the model's name is added when it is sent
    predicate: Callable[[Answer, Facts], Facts]  # of an answer and its request; or raises Wrong


TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
COUNT = "Count on: 1, 2, 3, 4, 5,"  # any model goes on with a number and a comma
ASK = [{"role": "user", "content": "Count from one to twenty in words."}]
CHECKS = (
    Check("health", "/health", {}, is_ok),
    Check("list models", "/v1/models", {}, lists_model),
    Check("completions", TEXT, {"prompt": COUNT, "max_tokens": 16, "temperature": 0}, generates),
    Check("chat", CHAT, {"messages": ASK, "max_tokens": 32, "temperature": 0}, generates),
    Check("sampling parameters", TEXT, {"prompt": "Once upon a time", "max_tokens": 16,
          "temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 42}, generates),
    Check("streaming", CHAT, {"messages": ASK, "max_tokens": 32, "temperature": 0,
          "stream": True, "stream_options": {"include_usage": True}}, streams),
    # TensorRT-LLM looks for the stop sequence's own tokens, and a comma is hardly ever merged.
    Check("stop sequences", TEXT,
          {"prompt": COUNT, "max_tokens": 32, "temperature": 0, "stop": ","}, generates),
    Check("batch", TEXT, {"prompt": ["The capital of France is", "The capital of Japan is"],
          "max_tokens": 16, "temperature": 0}, generates),
)  # fmt: skip


class Target(NamedTuple):
    url: str
    model: str = ""  # empty: whatever the server lists first
    file: str = ""  # the file that named it
    replicas: Sequence[tuple[str, str]] = ()  # name and URL of those behind a fleet's address


def settings() -> dict[str, str]:
    """The environment, then .env here, then .env next to this script."""
    found: dict[str, str | None] = {}
    try:
        from dotenv import dotenv_values

        for path in (Path(__file__).resolve().with_name(".env"), Path(".env")):
            check_owner(path, "it decides who gets the key: make it your own")
            found |= dotenv_values(path)
    except ImportError:
        pass
    except (OSError, ValueError) as e:
        raise Trouble(f".env cannot be read: {e}", 1) from e
    # Not HOST: conda's compilers export HOST=x86_64-conda-linux-gnu, tcsh the client's own name.
    found |= {name: value for name, value in os.environ.items() if name != "HOST" and value}
    return {name: value for name, value in found.items() if value}


def check_owner(path: Path, why: str) -> None:
    """Trouble if others may have written the file: they could have our key sent to them."""
    if path.is_file():
        state, ours = path.stat(), {os.geteuid(), 0, Path(__file__).stat().st_uid}
        if state.st_uid not in ours or state.st_mode & 0o002:
            raise Trouble(f"{path} is somebody else's, or everybody may write it, and {why}", 1)


def find_target(args: argparse.Namespace, env: dict[str, str]) -> Target:
    host = args.host or env.get("HOST", "")
    # A URL on the command line is complete: PORT was meant for something else.
    port = port_number(args.port or ("" if "://" in args.host else env.get("PORT", "")))
    left = None if host else left_by_launcher(env.get("WORKSPACE", ""))
    # PORT in the environment is the launcher's own setting and overrides no record.
    if left and port_number(args.port) in (0, urlsplit(left.url).port):
        return left._replace(model=args.model or left.model)
    url = base_url(host or "localhost", port)
    if args.port and urlsplit(url).port != port:
        raise Trouble(f"{host!r} and -p {port} name two ports: which one?")
    return Target(url, args.model or env.get("MODEL", ""))


def port_number(text: str) -> int:
    if text and not (re.fullmatch("[0-9]{1,5}", text) and 0 < int(text) < 65536):
        raise Trouble(f"{text!r} is not a port: 1 to 65535")
    return int(text or 0)


def left_by_launcher(workspace: str) -> Target | None:
    for path in (Path(workspace, "logs/endpoint.json"), Path("logs/endpoint.json")):
        try:
            if path.is_file():
                left = json.loads(path.read_text(encoding="utf-8"))
                each = [(str(r["name"]), base_url(r["url"])) for r in left.get("replicas") or ()]
                return Target(base_url(left["url"]), str(left.get("model") or ""), str(path), each)
        except Exception as e:  # the file may hold anything
            wrong = f"{path} does not name a server ({e})"
            raise Trouble(f"{wrong}: remove it, or name the server with -H and -p", 1) from e
    return None


def base_url(host: str, port: int = 0) -> str:
    """The URL to append /v1/... to; it ends with a slash if the API has another path for /v1."""
    if host.count(":") > 1 and not {"[", "/"} & {*host}:
        host = f"[{host}]"  # a bare IPv6 address
    try:
        url = urlsplit(host if "://" in host else f"http://{host}")
        own = url.port
    except ValueError as e:
        raise Trouble(f"{host!r} is neither a host nor a URL: {e}") from e
    odd = url.scheme not in ("http", "https") or not url.hostname or own == 0
    if odd or re.search(r"[\s@?#\\]", host) or not host.isprintable():
        raise Trouble(f"{host!r} is neither a host nor an http(s) URL (without login or query)")
    tail = f":{port or 8000}" if not own and (port or "://" not in host) else ""
    path, end, *_ = re.split("(/(?:chat/)?completions|/models)?/*$", url.path)
    slash = "/" * bool(end or re.search(r"/v\d\w*$", path)) * (not path.endswith("/v1"))
    return f"{url.scheme}://{url.netloc.rstrip(':')}{tail}{path.removesuffix('/v1')}{slash}"


CAUSES = {  # by name: a reset can be any of three classes
    "gaierror": "no such host name",
    "ConnectionRefusedError": "connection refused",
    "TimeoutError": "timed out",
    "SSLCertVerificationError": "no trusted certificate: set SSL_CERT_FILE, or take --insecure",
    "RemoteDisconnected": "the connection was closed without an answer",
    "ConnectionResetError": "the connection was reset",
    "BadStatusLine": "what came is not HTTP",
    "ValueError": "what came is not HTTP",  # a status or a chunk size that is no number
    "LineTooLong": "a line of the answer does not end",
    "IncompleteRead": "the answer broke off",
}


def cause(error: BaseException) -> str:
    """The innermost error: http.client wraps some in one of its own."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    name = "IncompleteRead" if str(error).endswith(" b''") else type(error).__name__  # no chunk
    return CAUSES.get(name, str(error) if name == "Wrong" else f"{name}: {error}")


class Server(NamedTuple):
    url: str
    key: str
    seconds: float  # for one whole request
    tls: ssl.SSLContext

    def curl(self, path: str, body: Facts) -> str:
        """The request as a line to paste: the shell fills in the key; no proxy is used."""
        auth = '-H "Authorization: Bearer $OPENAI_API_KEY" ' if self.key else ""
        words = [re.sub("(?<!:)//v1/", "/", self.url + path)]
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
        insecure = "k" * (not self.tls.check_hostname)
        return f"curl -isSN{insecure} --noproxy '*' {auth}{shlex.join(words)}"

    def fetch(self, path: str, body: Facts) -> Answer:
        """The answer, or what came of it in time: a server can drip bytes for ever."""
        exchange = (path, body, answer := Answer(), time.perf_counter())
        reader = threading.Thread(target=self.converse, args=exchange, daemon=True)
        reader.start()
        reader.join(self.seconds)
        if not reader.is_alive():
            return answer
        why = f"the answer did not {'end' if answer.status else 'begin'} in {self.seconds:g} s"
        return replace(answer, broken=why, ms=self.seconds * 1000)

    def converse(self, path: str, body: Facts, answer: Answer, start: float) -> None:
        try:
            for block in self.send(path, body, answer):
                answer.body += block
                answer.stamps.append((len(answer.body), (time.perf_counter() - start) * 1000))
                if DONE.search(answer.body[-64:]) and re.search(rb'"usage"\s*:\s*{', answer.body):
                    break
                if len(answer.body) > MAX_BODY or time.perf_counter() - start > self.seconds:
                    raise Wrong("the answer does not end")
        except Exception as e:  # http.client lets a dozen unrelated kinds through
            answer.broken = "" if DONE.search(answer.body) else cause(e)
        answer.ms = (time.perf_counter() - start) * 1000

    def send(self, path: str, body: Facts, answer: Answer) -> Iterator[bytes]:
        """Yield the bytes as they come. Proxies and redirects would take the key elsewhere."""
        host, wait = (url := urlsplit(self.url)).hostname or "", min(CONNECT_SECONDS, self.seconds)
        connection = http.client.HTTPConnection(host, url.port, timeout=wait)
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(host, url.port, timeout=wait, context=self.tls)
        headers = {"User-Agent": "test.py", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= {"Content-Type": "application/json"} if body else {}
        method, content = ("POST", json.dumps(body)) if body else ("GET", None)
        with closing(connection):
            connection.connect()
            (sock := connection.sock).settimeout(self.seconds)
            connection.request(method, (url.path + path).replace("//v1/", "/"), content, headers)
            response = connection.getresponse()
            while 100 < response.status < 200:  # Early Hints; http.client skips only 100
                response.headers = None  # type: ignore[assignment]
                response.begin()
            answer.status = response.status
            answer.content_type = response.headers.get("Content-Type", "")
            if 300 <= response.status < 400:
                raise Wrong(f"redirected to {response.headers['Location']}: not followed")
            left = response.length  # which not every Python's read1 counts down
            while left != 0 and (block := response.read1(min(READ, left or READ))):
                left = left and left - len(block)
                yield block
                if DONE.search(answer.body[-64:]):  # usage may follow, or the end may never come
                    sock.settimeout(0.5)
            if left:
                raise http.client.IncompleteRead(b"", left)


def run_all(server: Server, target: Target) -> Iterator[Facts]:
    model, reachable = target.model, True
    for check in CHECKS:
        # Without a name, "default": TensorRT-LLM takes any, and SGLang knows its model by it.
        body = {"model": model or "default", **check.body} if check.body else {}
        nothing = dict.fromkeys(("ok", "status", "ms", "ttft_ms", "answer")) | {"detail": "not run"}
        result: Facts = {"name": check.name, **nothing, "curl": server.curl(check.path, body)}
        if reachable:
            result |= run(check, server, body or {"model": model})
        if check.path == "/health" and reachable and not result["status"]:
            reachable = False
            if "certificate" not in result["detail"]:
                leftover = f" {target.file} names it: a leftover?" if target.file else ""
                result["detail"] += f": no server at {server.url}. Is it up? `make status` shows "
                result["detail"] += f"what runs; -H and -p name another.{leftover}"
        model = result.pop("model", model)  # from here on as the server calls it
        yield result


def run(check: Check, server: Server, ask: Facts) -> Facts:
    answer, without = server.fetch(check.path, ask if check.body else {}), ""
    while name := refused(answer, ask):
        ask = {new: ask[key] for key in ask if (new := SPARE[name] if key == name else key)}
        without += f", without {name}"
        answer = server.fetch(check.path, ask)
    curl = server.curl(check.path, ask if check.body else {})
    result = {"ms": round(answer.ms, 1), "status": answer.status or None, "curl": curl}
    try:
        found = check.predicate(answer, ask)
        return result | {"ok": True} | found | {"detail": found["detail"] + without}
    except Wrong as wrong:
        body = answer.body[: 8 * SHOWN].decode(errors="replace")
        key = re.escape(server.key) or "(?!)"  # some servers repeat it
        detail, text = (re.sub(key, "***", text)[:SHOWN] for text in (str(wrong), body))
        # No such path, or no such model? Not all have every path, or take several prompts.
        gone = answer.status in (404, 405) and "model" not in text.replace(check.path, "")
        gone |= answer.status in (400, 422) and check.name == "batch" and "string" in text
        gone |= answer.status == 404 and "chat model" in text  # OpenAI's, of completions
        return result | {"ok": None if gone else False, "detail": detail, "answer": text}


def refused(answer: Answer, ask: Facts) -> str:
    """The field that a 400 or 422 names and that we can do without; '' if there is none."""
    said = answer.body.decode(errors="replace") if answer.status in (400, 422) else ""
    return next((n for n, other in SPARE.items() if n in ask and n in said and other in said), "")


def show(result: Facts, out: TextIO) -> Facts:
    word, code = {True: ("ok", 32), False: ("FAIL", 31), None: ("-", 2)}[result["ok"]]
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    mark = f"\033[{code}m{word:<4}\033[0m" if colour else f"{word:<4}"
    ms = "" if result["ms"] is None else f"{result['ms']:.1f} ms"
    line = f"  {mark}  {result['name']:<19} {ms:>11}  {printable(result['detail'])[:SHOWN]}"
    print(line.rstrip(), file=out, flush=True)
    if result["ok"] is False and "curl" in result:
        answered = f"\n        {result['status']} {printable(result['answer'])}".rstrip()
        print(f"        $ {result['curl']}{answered if result['status'] else ''}", file=out)
    return result


def printable(text: str) -> str:
    """The text on one line, with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def smoke(args: argparse.Namespace) -> int:
    env = settings()
    target, key = find_target(args, env), env.get("OPENAI_API_KEY", "")
    if not re.fullmatch("[!-~]*", key):  # http.client's complaint would print it
        raise Trouble("OPENAI_API_KEY has characters that no HTTP header can carry")
    if bundle := env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE"):
        os.environ[f"SSL_CERT_{'DIR' if Path(bundle).is_dir() else 'FILE'}"] = bundle  # OpenSSL's
    tls = ssl.create_default_context()
    if args.insecure:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    if key and target.file:
        check_owner(Path(target.file), "OPENAI_API_KEY is not sent there: -H, -p name a server")
    out = sys.stderr if args.json else sys.stdout
    if isinstance(out, TextIOWrapper):
        out.reconfigure(errors="backslashreplace")  # the text may not be ASCII, the locale may
    print("Testing", target.url + f", from {printable(target.file)}" * bool(target.file), file=out)
    if args.each and not target.replicas:
        raise Trouble(f"--each: {target.file or target.url} names no replicas")
    servers = (("front", target.url), *target.replicas) if args.each else (("", target.url),)
    found = [check_all(n, Server(url, key, args.timeout, tls), target, out) for n, url in servers]
    good = sum(one["ok"] for one in found)
    print(f"{good}/{len(found)} servers passed" if args.each else found[0]["detail"], file=out)
    if args.json:
        print(json.dumps({"servers": found} if args.each else found[0], indent=2))
    sys.stdout.flush()
    return 0 if good == len(found) else 1


def check_all(name: str, server: Server, target: Target, out: TextIO) -> Facts:
    """Print a line per check; for a named server, one for all checks and those that failed."""
    results = [r if name else show(r, out) for r in run_all(server, target)]
    passed, failed = ([r for r in results if r["ok"] is ok] for ok in (True, False))
    ok = any(r["name"] in ("completions", "chat") for r in passed) and not failed
    rest = "" if failed or passed == results else f", {len(results) - len(passed)} not served"
    words = f"{len(passed)}/{len(results)} passed{rest}" + f"  {server.url}" * bool(name)
    whole = {"name": name, "ok": ok, "ms": sum(r["ms"] or 0 for r in results), "detail": words}
    for each in (whole, *failed) if name else ():
        show(each, out)
    return {"url": server.url, "passed": len(passed), **whole, "checks": results}


def seconds(text: str) -> float:
    if not 0 < (value := float(text)) <= 86400:
        raise argparse.ArgumentTypeError("more than 0, at most 86400")
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("-H", "--host", default="", help="name or URL (of logs/endpoint.json, else localhost)")
    add("-p", "--port", default="", help="(of logs/endpoint.json, else 8000)")
    add("-m", "--model", default="", help="must be served there (default: the first one served)")
    add("--each", action="store_true", help="each replica in logs/endpoint.json, and the front")
    add("--insecure", action="store_true", help="accept any https certificate")
    add("--timeout", type=seconds, default=60.0, help="seconds a request may take (default: 60)")
    add("--json", action="store_true", help="one JSON document on stdout, the lines on stderr")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout, sys.stderr = (s or StringIO() for s in (sys.stdout, sys.stderr))  # >&-
    try:
        return smoke(parse_arguments(argv))
    except Trouble as trouble:
        sentence, code, *_ = *trouble.args, 2
        print(f"test.py: {printable(sentence)}", file=sys.stderr)
        return int(code)
    except KeyboardInterrupt:
        print("test.py: interrupted", file=sys.stderr)
        return 130
    except OSError as e:  # stdout: `| head`, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"test.py: the results could not be written: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
