"""test.py: what each check lets pass, and how it takes servers that fail, lie or never end."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "test.py"
SIMULATOR = ROOT / "simulator" / "trtllm-serve"
MODEL = "Qwen/Qwen2.5-7B-Instruct"

spec = importlib.util.spec_from_file_location("smoke", SCRIPT)
assert spec and spec.loader
smoke = importlib.util.module_from_spec(spec)
sys.modules["smoke"] = smoke
spec.loader.exec_module(smoke)

NAMES = [check.name for check in smoke.CHECKS]
CHECKS = {check.name: check for check in smoke.CHECKS}


@pytest.fixture(autouse=True)
def clean_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOST", "PORT", "MODEL", "WORKSPACE", "OPENAI_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "")  # so that what main() makes of it is undone
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/test.py").touch()
    monkeypatch.setattr(smoke, "__file__", str(tmp_path / "scripts" / "test.py"))


# ---- A server that conforms, in the dialects of three engines.

Reply = tuple[int, str, bytes]
FIELDS = {  # what TensorRT-LLM 1.1.0 takes (it refuses the rest), of what test.py might send
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stream", "stream_options",
}  # fmt: skip


def name_of(path: str, body: dict[str, Any]) -> str:
    """Which check a request belongs to."""
    if not body:
        return "health" if path == "/health" else "list models"
    if "messages" in body:
        return "streaming" if body.get("stream") else "chat"
    if isinstance(body["prompt"], list):
        return "batch"
    special = {"stop": "stop sequences", "top_p": "sampling parameters"}
    return next((name for key, name in special.items() if key in body), "completions")


def usage(prompt: int, completion: int) -> dict[str, Any]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def as_json(value: object, status: int = 200) -> Reply:
    return status, "application/json", json.dumps(value).encode()


def thoughts(count: int) -> dict[str, Any]:
    return usage(7, 3) | {"completion_tokens_details": {"reasoning_tokens": count}}


def error(dialect: str, message: str, status: int = 400) -> Reply:
    flat = {"object": "error", "message": message, "type": "BadRequestError", "code": status}
    return as_json({"error": flat} if dialect == "vllm" else flat, status)


def choice(index: int, text: str, body: dict[str, Any]) -> dict[str, Any]:
    stop = body.get("stop")
    said = text.partition(stop)[0] if stop else text
    part = {"message": {"role": "assistant", "content": said}}
    end = {"index": index, "finish_reason": "stop" if said != text else "length"}
    return end | (part if "messages" in body else {"text": said})


def sse(events: list[object]) -> Reply:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return 200, "text/event-stream; charset=utf-8", "".join([*lines, "data: [DONE]\n\n"]).encode()


def stream(dialect: str, body: dict[str, Any]) -> Reply:
    def event(delta: dict[str, Any], end: str | None = None) -> dict[str, Any]:
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        return chunk if dialect == "vllm" else {**chunk, "usage": None}

    texts = [event({"content": word}) for word in ("one", ", two", ", three")]
    opening, last = event({"role": "assistant", "content": ""}), event({}, "length")
    return sse([opening, *texts, last, {"choices": [], "usage": usage(9, 3)}])


def conforming(dialect: str, path: str, body: dict[str, Any]) -> Reply:
    if path == "/health":
        return 200, "text/plain", {"sglang": b"ok\n"}.get(dialect, b"")
    if path == "/v1/models":
        return as_json({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    if unknown := body.keys() - FIELDS:
        return error(dialect, f"extra fields are forbidden: {unknown}")
    if dialect == "vllm" and body["model"] != MODEL:
        return error(dialect, f"The model `{body['model']}` does not exist.", 404)
    if body.get("stream"):
        return stream(dialect, body)
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [""]
    choices = [choice(i, " 6, 7, 8", body) for i in range(len(prompts))]
    count = len(prompts)
    details: dict[str, Any] = {"vllm": {"prompt_tokens_details": None}}.get(dialect, {})
    return as_json({"choices": choices, "usage": usage(7 * count, 3 * count) | details})


Respond = Callable[["Handler", str, dict[str, Any]], "Reply | None"]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if self.command == "POST" else {}
        assert self.command == "POST" or not length
        self.server.seen.append((self.path, dict(self.headers), body))
        with suppress(OSError):  # the client has had enough
            reply = self.server.respond(self, self.path, body)
            if reply is None:
                self.close_connection = True
                return
            status, content_type, content = reply
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    respond: Respond

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.address_family = family
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.closing = threading.Event()
        super().__init__(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(respond: Respond, **options: socket.AddressFamily) -> Iterator[Server]:
    server = Server(**options)
    server.respond = respond
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def good(dialect: str = "trtllm") -> Respond:
    return lambda handler, path, body: conforming(dialect, path, body)


def bad(name: str, misbehave: Callable[[Handler], Reply | None]) -> Respond:
    """Conforming but for one check."""

    def respond(handler: Handler, path: str, body: dict[str, Any]) -> Reply | None:
        return misbehave(handler) if name_of(path, body) == name else good()(handler, path, body)

    return respond


Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """main() with --json: exit code, document, stderr."""

    def call(*argv: str) -> tuple[int, dict[str, Any], str]:
        code = smoke.main(["--json", *argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, json.loads(out), err

    return call


def failed(document: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in document["checks"] if not check["ok"]}


def script(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


# ---- Predicates.


def verdict(name: str, content: object, status: int = 200, content_type: str = "") -> str:
    """The sentence of a check on an answer; empty when it passes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    made = smoke.Answer(status, content_type, bytearray(body), [(len(body), 5.0)])
    check = CHECKS[name]
    try:
        check.predicate(made, {"model": "", **check.body})
    except smoke.Wrong as wrong:
        return str(wrong)
    return ""


def completion(**changes: object) -> dict[str, Any]:
    one = {"index": 0, "text": " 6", "finish_reason": "length"} | changes
    return {"choices": [one], "usage": changes.pop("usage", usage(7, 3))}


def test_no_answer_is_shorter_than_openrouter_writes() -> None:
    assert min(check.body.get("max_tokens", 16) for check in CHECKS.values()) >= 16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dialect", ["trtllm", "vllm", "sglang"])
def test_each_predicate_accepts_each_dialect(name: str, dialect: str) -> None:
    check = CHECKS[name]
    body = {"model": MODEL, **check.body} if check.body else {}
    status, content_type, content = conforming(dialect, check.path, body)
    assert verdict(name, content, status=status, content_type=content_type) == ""


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (completion(text=""), "the text is empty"),
        (completion(text=" \n"), "the text is empty"),
        (completion(text=None), "the text is empty"),
        (completion(text=5), "the text is empty"),
        (completion(text="", usage=thoughts(0)), "the text is empty"),
        (completion(finish_reason=None), "finish_reason is None"),
        (completion(finish_reason=["stop"]), "finish_reason is ['stop']"),
        (completion(finish_reason="abort"), "finish_reason is 'abort'"),
        (completion(finish_reason="timeout"), "finish_reason is 'timeout'"),
        (completion(index=1), "indices are [1]"),
        (completion(index={}), "indices are [{}]"),
        (completion(usage=None), "usage is missing"),
        (completion(usage=[]), "usage is missing"),
        (completion(usage=usage(7, 0)), "7 prompt + 0 completion"),
        (completion(usage=usage(0, 3)), "0 prompt + 3 completion"),
        (completion(usage=usage(7, 17)), "with 16 allowed"),
        (completion(usage=usage(7, 3) | {"total_tokens": 9}), "= 9 tokens"),
        (completion(usage=usage(7, 3) | {"total_tokens": None}), "= None tokens"),
        (completion(usage=usage(7, 3) | {"prompt_tokens": "7"}), "not three numbers"),
        (completion(usage=usage(7, 3) | {"prompt_tokens": 7.5}), "not three numbers"),
        ({"choices": [], "usage": usage(7, 3)}, "indices are []"),
        ({"choices": [None]}, "no list of objects under 'choices'"),
        ({"choices": None}, "no list of objects under 'choices'"),
        ({"choices": "abc"}, "no list of objects under 'choices'"),
        ([], "no list of objects"),
        (None, "no list of objects"),
        ("text", "no list of objects"),
        (b'{"choices": NaN}', "not JSON"),
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (gzip.compress(b"{}", mtime=0), "not JSON: gzip"),
        (b'{"choices": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
    ],
)
def test_a_bad_completion_is_told_in_a_sentence(reply: object, sentence: str) -> None:
    assert sentence in verdict("completions", reply)


@pytest.mark.parametrize(("count", "words"), [(1, "1 token"), (3, "3 tokens")])
def test_the_tokens_of_an_answer_are_counted(count: int, words: str) -> None:
    found = smoke.judge(completion(usage=usage(7, count)), {"prompt": "x", "max_tokens": 9})
    assert found == {"detail": words}


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ({"content": "one"}, True),
        ({"content": None, "reasoning_content": "Let me"}, True),
        ({"content": "", "reasoning": "Let me"}, True),
        ({"content": None}, False),
        ({"content": [{"type": "text"}]}, False),
        ({"content": [{"type": "text", "text": "one"}]}, True),
        ({"content": [{"type": "thinking", "thinking": [{"text": "Let me"}]}]}, True),
        ({}, False),
        (None, False),
    ],
)
def test_chat_wants_words_of_content_or_of_reasoning(message: object, accepted: bool) -> None:
    reply = completion(message=message)
    assert (verdict("chat", reply) == "") is accepted


def test_all_tokens_may_be_thoughts_that_only_the_total_counts() -> None:
    silent = completion(message={"content": None}, usage=usage(7, 0) | {"total_tokens": 36})
    assert verdict("chat", silent) == ""
    assert "the text is empty" in verdict("chat", completion(message={}, usage=usage(7, 3)))


def test_a_completion_is_not_taken_for_chat() -> None:
    assert verdict("chat", completion()) == "the text is empty"


@pytest.mark.parametrize(
    ("text", "end", "accepted"),
    [
        (" 6", "stop", True),
        ("", "stop", True),  # it stopped at once
        (" six seven", "length", True),  # no comma came
        ("", "eos_token", True),  # TGI's word for stop
        ("", "max_tokens", False),
        ("", "length", False),
        (" 6, 7", "length", False),
        (" 6,", "stop", False),
    ],
)
def test_the_stop_sequence_must_not_be_seen(text: str, end: str, accepted: bool) -> None:
    reply = completion(text=text, finish_reason=end)
    assert (verdict("stop sequences", reply) == "") is accepted


@pytest.mark.parametrize("indices", [[0], [0, 0], [1, 2], [0, 1, 2], [None, 0]])
def test_a_batch_wants_one_choice_for_each_prompt(indices: list[Any]) -> None:
    choices = [{"index": i, "text": "Paris", "finish_reason": "length"} for i in indices]
    assert "indices" in verdict("batch", {"choices": choices, "usage": usage(12, 6)})


def test_batch_choices_may_come_in_any_order() -> None:
    choices = [{"index": i, "text": "Paris", "finish_reason": "length"} for i in (1, 0)]
    assert verdict("batch", {"choices": choices, "usage": usage(12, 16)}) == ""


STREAM = stream("trtllm", {})[2]
BEATS = (b"event: ping\ndata: ping", b"data: null", b'data: ""', b"data: [KEEPALIVE]", b"data: 1")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "0 event is not a stream"),
        (b"data: [DONE]\n\n", "0 event is not a stream"),
        (b"data: {}\n\ndata: [DONE]\n\n", "1 event is not a stream"),
        (STREAM.replace(b'"content"', b'"kontent"'), "the text is empty"),
        (STREAM.replace(b'"length"', b"null"), "finish_reason is None"),
        (STREAM.replace(b'"total_tokens": 12', b'"total_tokens": 11'), "= 11 tokens"),
        (STREAM.replace(b'"usage"', b'"uzage"'), "usage is missing"),
        (STREAM.replace(b"one", b"\xff"), "not JSON"),
        (b'data: {"error": {"message": "died"}}\n\n' + STREAM, 'an error in the stream: {"mess'),
        (b'{"error": {"message": "died"}}', 'an error in the stream: {"message": "died"}'),
        (b"data: ping\n\ndata: null\n\n", "0 event is not a stream"),
        (b'data: {"choices": [null]}\n\n' + STREAM, "no list of objects"),
        (b"data: {\n\n" + STREAM, "not JSON"),
    ],
)
def test_a_bad_stream_is_told_in_a_sentence(content: bytes, sentence: str) -> None:
    assert sentence in verdict("streaming", content, content_type="text/event-stream")


@pytest.mark.parametrize(
    "content",
    [
        STREAM.replace(b"\n", b"\r\n"),
        STREAM.replace(b"data: ", b"data:"),
        b": ping\n\nevent: message\n" + STREAM,
        b"\xef\xbb\xbf" + STREAM,
        STREAM.replace(b"\n\n", b"\r\n\n", 3).replace(b"\n", b"\r", 2),
        STREAM.replace(b"data: ", b"data:\n\ndata: "),  # an empty one, for a heartbeat
        STREAM.replace(b"data: ", b"data: \n\ndata: "),  # and with a space in it
        STREAM + b'data: {"after": "the end"}\n\n',
        *(beat + b"\n\n" + STREAM for beat in BEATS),
        STREAM.replace(b', "usage"', b',\ndata: "usage"'),  # events of two lines
        STREAM.replace(b'"one"', b'[{"type": "text", "text": "one"}]'),  # Mistral's
        b'data: {"type": "ping"}\n\n' + STREAM,
    ],
)
def test_a_stream_may_use_all_of_the_event_grammar(content: bytes) -> None:
    for status in (200, 201):
        assert verdict("streaming", content, status, "text/event-stream") == ""


def test_a_stream_may_end_with_its_last_word() -> None:
    body = bytearray(STREAM.rstrip())
    made = smoke.Answer(200, "text/event-stream", body, [(len(body), 5.0)])
    assert "[DONE]" not in smoke.streams(made, CHECKS["streaming"].body)["detail"]


def test_a_stream_must_say_that_it_is_one() -> None:
    assert "content type" in verdict("streaming", STREAM, content_type="application/json")


@pytest.mark.parametrize(
    "data", [None, [], {}, [None], [{}], [{"id": ""}], [{"id": 5}], [{"id": "a"}, {"id": None}]]
)
def test_a_list_without_named_models_fails(data: object) -> None:
    assert verdict("list models", {"data": data}) != ""


@pytest.mark.parametrize(
    ("asked", "ids", "used"),
    [
        ("", ["a", "b"], "a"),
        ("b", ["a", "b"], "b"),
        ("/fsx/models/Qwen/", ["Qwen"], "Qwen"),
        ("/fsx/models/Qwen", ["/fsx/models/Qwen"], "/fsx/models/Qwen"),
        ("./Qwen", ["Qwen"], "Qwen"),
        ("org/Qwen", ["Qwen"], None),
        ("a", ["A"], None),
        ("x" * 5000, ["A"], None),
        ("", ["x" * 5000], "x" * 5000),
    ],
)
def test_the_asked_model_must_be_listed(asked: str, ids: list[str], used: str | None) -> None:
    content = json.dumps({"data": [{"id": name} for name in ids]}).encode()
    answer = smoke.Answer(status=200, body=bytearray(content))
    if used:
        assert smoke.lists_model(answer, {"model": asked})["model"] == used
    else:
        with pytest.raises(
            smoke.Wrong, match=f"{asked} was asked for, but the server has {ids[0]}"
        ):
            smoke.lists_model(answer, {"model": asked})


def test_nothing_is_sent_that_crashes_or_confuses_an_engine() -> None:
    for check in smoke.CHECKS:
        if check.body:
            assert check.body.keys() < FIELDS
            assert check.body["max_tokens"] > 0
            assert check.body.get("top_k", 1) > 0
            assert len(json.dumps(check.body)) < 300


# ---- Which server.


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("node1", 0, "http://node1:8000"),
        ("10.0.0.1", 9000, "http://10.0.0.1:9000"),
        ("node1:9000", 0, "http://node1:9000"),
        ("node1:9000", 9000, "http://node1:9000"),
        ("::1", 0, "http://[::1]:8000"),
        ("[::1]", 9000, "http://[::1]:9000"),
        ("[::1]:9000", 0, "http://[::1]:9000"),
        ("https://llm.example.com", 0, "https://llm.example.com"),
        ("https://llm.example.com/", 8443, "https://llm.example.com:8443"),
        ("http://gw:80/trt/v1/", 0, "http://gw:80/trt"),
        ("http://[fd00::1]:8000/v1", 0, "http://[fd00::1]:8000"),
        ("http://node/a/v1/chat/completions", 0, "http://node/a"),
        ("https://google/v1beta/openai/chat/completions", 0, "https://google/v1beta/openai/"),
        ("https://api.z.ai/api/paas/v4", 0, "https://api.z.ai/api/paas/v4/"),
        ("https://a.com/client/v4/ai/v1", 0, "https://a.com/client/v4/ai"),
    ],
)
def test_a_host_may_be_a_name_an_address_or_a_url(host: str, port: int, url: str) -> None:
    assert smoke.base_url(host, port) == url


@pytest.mark.parametrize(
    "host",
    ["ftp://a", "http://", "a b", "a\nb", "http://u:p@a", "a:0", "a:99999", "http://a?x", "a#b",
     "a:x", "[::1", "\x1b[31m", "http://a:9000 -p", "file:///etc/passwd"],
)  # fmt: skip
def test_an_odd_host_is_a_usage_error(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["-H", host]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("test.py: ") and err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8000 ", "٣", "9" * 5000])
def test_an_odd_port_is_a_usage_error(port: str) -> None:
    assert smoke.main([f"--port={port}"]) == 2


def test_two_different_ports_are_a_usage_error() -> None:
    assert smoke.main(["-H", "http://a:9000", "-p", "8000"]) == 2


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "1e9", "soon"])
def test_an_odd_timeout_is_a_usage_error(timeout: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        smoke.main([f"--timeout={timeout}"])


def target(*argv: str) -> tuple[str, str, str]:
    url, model, file, _ = smoke.find_target(smoke.parse_arguments(argv), smoke.settings())
    return url, model, file


def endpoint(folder: Path, content: str) -> Path:
    (folder / "logs").mkdir(parents=True)
    path = folder / "logs" / "endpoint.json"
    path.write_text(content)
    return path


def test_without_anything_it_is_localhost_8000() -> None:
    assert target() == ("http://localhost:8000", "", "")


def test_flags_beat_the_environment_beats_dotenv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("HOST=fromdotenv\nPORT=1\nMODEL=dotenv\n")
    assert target() == ("http://fromdotenv:1", "dotenv", "")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("MODEL", "shell")
    assert target() == ("http://fromdotenv:2", "shell", "")
    assert target("-H", "flag", "-p", "3", "-m", "m") == ("http://flag:3", "m", "")
    assert target("-H", "http://flag") == ("http://flag", "shell", "")
    assert target("-H", "flag:9") == ("http://flag:9", "shell", "")


def test_dotenv_here_beats_the_one_next_to_the_script(tmp_path: Path) -> None:
    (tmp_path / "scripts" / ".env").write_text("HOST=there\nMODEL=there\n")
    (tmp_path / ".env").write_text("HOST=here\n")
    assert target() == ("http://here:8000", "there", "")


def test_the_shells_host_is_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")
    assert target()[0] == "http://localhost:8000"


def test_the_launchers_endpoint_is_used_unless_host_or_port_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = endpoint(tmp_path, '{"url": "http://10.0.0.1:8000", "model": "m", "job": 7}')
    assert target() == ("http://10.0.0.1:8000", "m", str(path.relative_to(tmp_path)))
    assert target("-m", "other")[1] == "other"
    monkeypatch.setenv("PORT", "30000")  # the launcher's setting hides no record
    assert target()[0] == "http://10.0.0.1:8000"
    monkeypatch.delenv("PORT")
    assert target("-p", "9000") == ("http://localhost:9000", "", "")
    assert target("-H", "a") == ("http://a:8000", "", "")


def test_the_workspaces_endpoint_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint(tmp_path, '{"url": "http://here:1"}')
    endpoint(tmp_path / "work", '{"url": "http://work:2", "model": null}')
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "work"))
    assert target()[0] == "http://work:2"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"url": null}', '{"url": 5}', '{"url": "ftp://a"}',
     '{"url": ""}', '{"url": "http://a:x"}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_a_garbage_endpoint_is_told_in_a_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint(tmp_path, "").write_bytes(content.encode(errors="surrogateescape"))
    assert smoke.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "logs/endpoint.json does not name a server" in err and "-H and -p" in err


def test_a_stale_endpoint_is_blamed(run: Run, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    endpoint(tmp_path, json.dumps({"url": f"http://127.0.0.1:{port}", "model": MODEL}))
    code, document, _ = run()
    assert code == 1
    assert "logs/endpoint.json names it: a leftover?" in document["checks"][0]["detail"]


def test_an_endpoint_that_lies_about_the_model_fails(run: Run, tmp_path: Path) -> None:
    with serving(good()) as server:
        endpoint(tmp_path, json.dumps({"url": server.url, "model": "another"}))
        code, document, _ = run()
    assert code == 1
    assert failed(document).keys() == {"list models"}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"HOST='a\nb'\n"])
def test_a_garbage_dotenv_is_told_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(content)
    assert smoke.main([]) in (1, 2)


# ---- Conforming servers pass.


@pytest.mark.parametrize("dialect", ["trtllm", "vllm", "sglang"])
def test_a_conforming_server_passes_all(dialect: str, run: Run) -> None:
    with serving(good(dialect)) as server:
        code, document, err = run("-H", server.url)
    assert (code, failed(document), document["passed"]) == (0, {}, 8)
    assert [check["name"] for check in document["checks"]] == NAMES
    assert err.endswith("8/8 passed\n")
    assert {body["model"] for _, _, body in server.seen if body} == {MODEL}


def test_an_api_may_have_another_version_than_v1(run: Run) -> None:
    def respond(handler: Handler, path: str, body: dict[str, Any]) -> Reply | None:
        assert path.startswith("/a/v4/")
        own = path.removeprefix("/a/v4").replace("//", "/")
        return conforming("trtllm", own if own == "/health" else f"/v1{own}", body)

    with serving(respond) as server:
        code, document, _ = run("-H", f"{server.url}/a/v4")
    assert (code, failed(document), document["passed"]) == (0, {}, 8)
    assert f"{server.url}/a/v4/models" in document["checks"][1]["curl"]


def test_the_human_lines_go_to_stdout_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(good()) as server:
        assert smoke.main(["-H", server.url]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and "\x1b" not in out
    assert lines[0] == f"Testing {server.url}" and lines[-1] == "8/8 passed"
    assert len(lines) == 10 and all(" ms" in line for line in lines[1:-1])
    assert "TTFT" in next(line for line in lines if "streaming" in line)


def test_a_missing_model_name_is_found_on_the_server_or_replaced(run: Run) -> None:
    with serving(bad("list models", lambda _: as_json({"data": []}))) as server:
        code, document, _ = run("-H", server.url)
    assert (code, document["passed"]) == (1, 7)
    assert {body["model"] for _, _, body in server.seen if body} == {"default"}


def test_another_model_than_the_asked_one_fails_though_the_engine_echoes_it(run: Run) -> None:
    with serving(good()) as server:
        code, document, _ = run("-H", server.url, "-m", "other")
    assert code == 1
    assert failed(document) == {"list models": f"other was asked for, but the server has {MODEL}"}


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_address_can_be_tested(run: Run) -> None:
    try:
        with serving(good(), family=socket.AF_INET6) as server:
            code, document, _ = run("-H", "::1", "-p", str(server.server_address[1]))
    except OSError:
        pytest.skip("no IPv6 loopback")
    assert (code, failed(document)) == (0, {})


def test_the_ttft_is_when_the_first_word_came(run: Run) -> None:
    def slowly(handler: Handler) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        opening, first, *rest = STREAM.split(b"\n\n")
        for pause, part in ((0.0, head + opening), (0.08, first), (0.5, b"\n\n".join(rest))):
            time.sleep(pause)
            handler.wfile.write(part + b"\n\n")

    with serving(bad("streaming", slowly)) as server:
        code, document, _ = run("-H", server.url)
    result = document["checks"][NAMES.index("streaming")]
    assert code == 0
    assert 80 <= result["ttft_ms"] < result["ms"] >= 580


# ---- A server that violates one check fails that check alone.


def changed(name: str, **changes: object) -> Callable[[Handler], Reply]:
    check = CHECKS[name]
    reply = json.loads(conforming("trtllm", check.path, {"model": MODEL, **check.body})[2])
    reply["choices"][0] |= changes
    return lambda _: as_json(reply)


MUTANTS: dict[str, Callable[[Handler], Reply | None]] = {
    "health": lambda _: (503, "text/plain", b"the engine is dead"),
    "list models": lambda _: as_json({"object": "list", "data": []}),
    "completions": changed("completions", text=""),
    "chat": changed("chat", message={"role": "assistant", "content": ""}),
    "sampling parameters": lambda _: error("vllm", "top_k is not supported"),
    "streaming": lambda _: (200, "text/event-stream", STREAM.replace(b'"length"', b"null")),
    "stop sequences": changed("stop sequences", text=" 6, 7, 8"),
    "batch": changed("batch", index=1),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_mutant_fails_its_check_and_no_other(name: str, run: Run) -> None:
    with serving(bad(name, MUTANTS[name])) as server:
        code, document, err = run("-H", server.url)
    assert (code, document["passed"]) == (1, 7)
    assert failed(document).keys() == {name}
    assert err.count("$ curl ") == 1 and err.endswith("7/8 passed\n")


def test_a_failed_check_shows_cause_request_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    long = b"\x1b[31m" + "ü".encode() + b"\x00\n" + b"x" * 1000
    with serving(bad("chat", lambda _: (500, "text/plain", long))) as server:
        assert smoke.main(["-H", server.url]) == 1
    cause, curl, answer = capsys.readouterr().out.splitlines()[4:7]
    assert cause.startswith("  FAIL  chat") and cause.endswith("status 500 instead of 200")
    assert curl.startswith("        $ curl ") and '"max_tokens": 32' in curl
    assert answer.startswith("        500 \\x1b[31mü\\x00\\nxxx") and len(answer) < 530


def test_terminal_escapes_in_a_model_name_stay_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(bad("list models", lambda _: as_json({"data": [{"id": "\x1b]0;x\x07"}]}))) as it:
        assert smoke.main(["-H", it.url]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_the_curl_lines_can_be_pasted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = """it's "a" $HOME `id` \\ ü;"""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-$x")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    listing = bad("list models", lambda _: as_json({"data": [{"id": hostile}]}))
    with serving(listing) as server:
        code, document, _ = run("-H", server.url, "-m", hostile)
        assert code == 0
        sent, server.seen[:] = list(server.seen), []
        for check in document["checks"]:
            done = subprocess.run(
                ["bash", "-c", check["curl"]], capture_output=True, timeout=PATIENCE
            )
            assert done.stdout.startswith(b"HTTP/1.1 200"), done
    assert [(path, body) for path, _, body in server.seen] == [(p, body) for p, _, body in sent]
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret-$x"}


# ---- The key, and what the environment must not bring in.


def test_the_key_is_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def echo(handler: Handler) -> Reply:
        return error("vllm", f"not {handler.headers['Authorization']}", 401)

    with serving(bad("chat", echo)) as server:
        smoke.main(["-H", server.url])
        smoke.main(["-H", server.url, "--json"])
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer sk-secret"}
    text = "".join(capsys.readouterr())
    assert "sk-secret" not in text and '"Authorization: Bearer $OPENAI_API_KEY"' in text


@pytest.mark.parametrize("key", ["se\ncret", "se cret", "sécret", "secret\r"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert smoke.main([]) == 2
    assert "cret" not in "".join(capsys.readouterr())


def test_proxies_and_netrc_are_left_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(good()) as server, serving(good()) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        code, _, _ = run("-H", server.url)
    assert code == 0 and proxy.seen == []
    assert not any("Authorization" in headers for _, headers, _ in server.seen)


def test_a_redirect_is_reported_and_not_followed(run: Run) -> None:
    with serving(good()) as elsewhere:

        def redirect(handler: Handler) -> None:
            location = f"Location: {elsewhere.url}/v1/models\r\n\r\n".encode()
            handler.wfile.write(b"HTTP/1.1 307 Temporary Redirect\r\n" + location)
            flood(b"x" * 65536)(handler)

        with serving(bad("list models", redirect)) as server:
            _, document, _ = run("-H", server.url, "-m", MODEL, "--timeout", str(PATIENCE))
    assert failed(document).keys() == {"list models"}
    assert elsewhere.seen == []


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl")
def test_https_wants_a_certificate_that_the_bundle_knows(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    with serving(good()) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http", "https")
        code, document, _ = run("-H", url)
        assert code == 1 and "certificate" in document["checks"][0]["detail"]
        folder = tmp_path / "certificates"
        folder.mkdir()
        named = subprocess.check_output("openssl x509 -noout -hash -in cert.pem".split(), text=True)
        (folder / f"{named.strip()}.0").symlink_to(tmp_path / "cert.pem")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder))
        assert run("-H", url)[0] == 0
        del os.environ["SSL_CERT_DIR"]
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        code, document, _ = run("-H", url)
        assert (code, failed(document)) == (0, {})
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
        code, document, err = run("-H", url)
        assert code == 1 and "SSL_CERT_FILE, or take --insecure" in document["checks"][0]["detail"]
        assert "no server at" not in err
        assert run("-H", url, "--insecure")[0] == 0


# ---- Servers that cannot be reached: said once.


def stopped_early(document: dict[str, Any]) -> str:
    first, *rest = document["checks"]
    assert first["ok"] is False
    assert all(check["ok"] is None and check["detail"] == "not run" for check in rest)
    return str(first["detail"])


def test_nothing_listening_is_said_once(run: Run) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    code, document, err = run("-H", "127.0.0.1", "-p", str(port))
    assert code == 1 and err.count("refused") == 1 and "0/8 passed" in err
    sentence = stopped_early(document)
    assert sentence.startswith(f"connection refused: no server at http://127.0.0.1:{port}.")
    assert "`make status`" in sentence


def test_an_unknown_host_is_said_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, document, _ = run("-H", "nowhere.invalid")
    assert code == 1 and stopped_early(document).startswith("no such host name: ")


def test_an_address_that_drops_packets_times_out(run: Run) -> None:
    with (
        closing(socket.socket()) as full,
        closing(socket.socket()) as a,
        closing(socket.socket()) as b,
    ):
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for client in (a, b):  # the queue is full: a further SYN is dropped
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        code, document, _ = run("-H", url, "--timeout", "0.3")
    assert code == 1
    assert "timed out" in stopped_early(document) or "did not begin" in stopped_early(document)


def test_a_silent_server_is_waited_for_once(run: Run) -> None:
    with serving(bad("health", hang)) as server:
        code, document, _ = run("-H", server.url, "--timeout", "1.5")
    assert code == 1 and len(server.seen) == 1
    stopped_early(document)


# ---- Hostile servers: a sentence, in bounded time and memory.


def hang(handler: Handler) -> None:
    handler.server.closing.wait(PATIENCE)


def flood(block: bytes, head: bytes = b"", pause: float = 0.0) -> Callable[[Handler], None]:
    """For ever the same."""

    def write(handler: Handler) -> None:
        handler.wfile.write(head)
        while not handler.server.closing.wait(pause):
            handler.wfile.write(block)

    return write


def once(content: bytes) -> Callable[[Handler], None]:
    def write(handler: Handler) -> None:
        handler.wfile.write(content)

    return write


def reset(handler: Handler) -> None:
    linger = b"\x01\0\0\0\0\0\0\0"
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n'
EVENTS = OK + b"Content-Type: text/event-stream\r\n\r\n"
GZIP = OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"

HOSTILE: dict[str, tuple[Callable[[Handler], None], str]] = {
    "says nothing": (hang, "did not begin in 1.5 s"),
    "closes at once": (lambda _: None, "closed without an answer"),
    "resets": (reset, "reset"),
    "drips a status line": (flood(b"H", pause=0.05), "did not begin in 1.5 s"),
    "drips headers": (flood(b"x", OK + b"X-", pause=0.05), "did not begin in 1.5 s"),
    "sends headers for ever": (flood(b"X: y\r\n" * 1000, OK), "more than"),
    "sends a header for ever": (flood(b"x" * 65536, OK), "does not end"),
    "says 100 Continue for ever": (
        flood(b"HTTP/1.1 100 Continue\r\n\r\n"),
        "did not begin in 1.5 s",
    ),
    "drips a body": (flood(b" ", OK + b"\r\n", pause=0.05), "end"),
    "sends a body for ever": (flood(b" " * 65536, OK + b"\r\n"), "does not end"),
    "sends 100 MB": (flood(b" " * 65536, OK + b"Content-Length: 100000000\r\n\r\n"), "not end"),
    "sends chunks for ever": (flood(b"4\r\nabcd\r\n" * 1000, CHUNKED), "not end"),
    "drips chunks": (flood(b"1\r\n \r\n", CHUNKED, pause=0.05), "end"),
    "sends a chunk size for ever": (
        flood(b"0" * 65536, CHUNKED),
        "line of the answer does not end",
    ),
    "sends trailers for ever": (
        flood(b"X: y\r\n" * 1000, CHUNKED + b"0\r\n"),
        "did not end in 1.5 s",
    ),
    "breaks off": (once(OK + b"Content-Length: 99\r\n\r\n{}"), ""),  # urllib3 1 takes it for whole
    "breaks off a chunk": (once(CHUNKED + b"9\r\n{}"), "broke off"),
    "has a bad chunk size": (once(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"), "not HTTP"),
    "speaks SSH": (once(b"SSH-2.0-OpenSSH_9.0\r\n"), "not HTTP"),
    "speaks HTTP 0.9": (once(b"<html>hello</html>"), "not HTTP"),
    "sends binary": (once(bytes(range(256))), "not HTTP"),
    "has no status": (once(b"HTTP/1.1 abc\r\n\r\n"), "not HTTP"),
    "has a garbage length": (once(OK + b"Content-Length: -5x\r\n\r\n{}"), ""),
    "has garbage headers": (once(OK + b"\xff\xfe: \x00\r\n:::\r\nx\r\n\r\n{}"), ""),
    "sends a gzip bomb's start": (once(GZIP), "not JSON"),
    "sends no UTF-8": (once(OK + b"Content-Length: 2\r\n\r\n\xff\xff"), "not JSON"),
    "answers 204": (once(b"HTTP/1.1 204 No Content\r\n\r\n"), "status 204"),
}

# For these its time has to run out; for the others a busy machine must not let it.
RUNS_OUT = ("did not begin in 1.5 s", "did not end in 1.5 s", "end")


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_server_that(kind: str, run: Run) -> None:
    misbehave, sentence = HOSTILE[kind]
    timeout = "1.5" if sentence in RUNS_OUT else str(PATIENCE)
    with serving(bad("list models", misbehave)) as server:
        code, document, _ = run("-H", server.url, "-m", MODEL, "--timeout", timeout)
    assert code == 1
    assert failed(document).keys() == {"list models"}
    words = failed(document)["list models"]
    assert sentence in words or (words == "timed out" and sentence in RUNS_OUT)


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_a_stream_without_an_end_is_ended_here(pause: float, run: Run) -> None:
    with serving(bad("streaming", flood(EVENT, EVENTS, pause))) as server:
        _, document, _ = run("-H", server.url, "--timeout", "1.5")
    assert failed(document).keys() == {"streaming"}
    assert "end" in failed(document)["streaming"]
    assert document["checks"][NAMES.index("streaming")]["answer"].startswith('data: {"choices"')


def test_a_server_that_dies_half_way_fails_the_rest(run: Run) -> None:
    def die(handler: Handler) -> None:
        handler.server.socket.close()

    with serving(good()) as server:
        server.respond = bad("chat", die)
        code, document, _ = run("-H", server.url, "--timeout", "1")
    assert code == 1 and "chat" in failed(document)


# ---- The script as a process.


def test_the_script_passes_and_fails_by_its_exit_code() -> None:
    with serving(good()) as server:
        passed = script("-H", server.url)
        server.respond = bad("stop sequences", MUTANTS["stop sequences"])
        missed = script("-H", server.url, "--json")
    assert (passed.returncode, passed.stderr) == (0, "")
    assert passed.stdout.endswith("\n8/8 passed\n")
    assert missed.returncode == 1 and json.loads(missed.stdout)["passed"] == 7
    assert "runs on past the stop sequence ','" in missed.stderr


def test_help_fits_a_screen_and_imports_little() -> None:
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "requests" not in done.stderr and "dotenv" not in done.stderr
    assert "\n  test.py -H " in done.stdout and "logs/endpoint.json, else" in done.stdout


def test_a_strange_flag_is_a_usage_error() -> None:
    done = script("--hosts", "a")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_traceback() -> None:
    with serving(good()) as server:
        command = f"'{sys.executable}' '{SCRIPT}' -H {server.url} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.stdout == "1\n"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_an_ascii_terminal_is_no_traceback() -> None:
    with serving(bad("chat", lambda _: (500, "text/plain", "größer".encode()))) as server:
        done = script("-H", server.url, PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and "gr\\xf6\\xdfer" in done.stdout and done.stderr == ""


def test_control_c_ends_it_with_130() -> None:
    with serving(bad("chat", hang)) as server:
        command = [sys.executable, "-u", str(SCRIPT), "-H", server.url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout and process.stderr
            while "completions" not in process.stdout.readline():
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
            assert process.stderr.read() == "test.py: interrupted\n"


def colours(*argv: str, **environment: str) -> bool:
    """Whether there is colour in what a terminal is sent."""
    master, terminal = os.openpty()
    with closing(os.fdopen(master, "rb", buffering=0)) as reader:
        subprocess.run(
            [sys.executable, str(SCRIPT), *argv], stdout=terminal, env=os.environ | environment
        )
        os.close(terminal)
        return b"\x1b[31m" in reader.read(4096)


def test_colour_is_for_terminals_that_want_it() -> None:
    assert colours("-p", "1")
    assert not colours("-p", "1", NO_COLOR="1")


# ---- The simulator.


@pytest.mark.skipif(not SIMULATOR.exists(), reason="the simulator is not there")
def test_the_simulator_passes_all(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(SIMULATOR), MODEL, "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"TRTLLM_SIM_LOAD_SECONDS": "0.05"}
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        done = script("-H", "127.0.0.1", "-p", str(port), "-m", MODEL)
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    assert done.stdout.endswith("8/8 passed\n")
