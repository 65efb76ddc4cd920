"""test.py against servers as they are in the wild: a fault where there is one, else a word."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import PATIENCE
from tests.loopback import DONE, LAST, MODEL, Answer, Request, chunk, event
from tests.servers import Ask, Kind, Piece, running, smoke, tokens, usual, whole
from tests.test_smoke import SCRIPT

pytestmark = pytest.mark.usefixtures("clean_environment")


def checks(kind: Answer, *args: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the checks by name, and the last line for people."""
    with running(kind) as server:
        said = smoke(server, "--json", *args)
    found = {check["name"]: check for check in json.loads(said.out)["checks"]}
    return said.code, found, said.err.splitlines()[-1]


def passes(kind: Answer, *args: str) -> dict[str, Any]:
    code, found, last = checks(kind, *args)
    assert (code, last) == (0, "8/8 passed"), found
    return found


# --- streams --------------------------------------------------------------------------------------


def lean(ask: Ask) -> Iterator[Piece]:
    """Events of less than 64 bytes, the second of them two seconds after the first."""
    for i in range(3):
        yield 2 if i == 1 else 0.05, b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    yield 0, b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
    yield 0, event({"choices": [], "usage": ask.usage(3)})
    yield 0, DONE


def test_the_ttft_of_short_events_does_not_wait_for_the_next() -> None:
    assert 50 <= passes(Kind(pieces=lean))["streaming"]["ttft_ms"] < 2000


def test_a_role_and_a_ping_are_no_token() -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        yield 0, ask.choice(delta={"role": "assistant", "content": ""}, finish_reason=None)
        yield 0, b": ping\n\ndata:\n\n"
        yield 0.2, ask.event(" one")
        yield from usual(ask)

    assert passes(Kind(pieces=pieces))["streaming"]["ttft_ms"] >= 200


def buffered(ask: Ask) -> Iterator[Piece]:
    pieces = list(usual(ask))
    yield sum(wait for wait, _ in pieces), b"".join(data for _, data in pieces)


def test_a_stream_that_was_buffered_has_no_ttft() -> None:
    streaming = passes(Kind(pieces=buffered))["streaming"]
    assert streaming["ttft_ms"] is None
    assert "all at once after" in streaming["detail"]
    assert "buffered on its way?" in streaming["detail"]


def test_a_stream_that_was_collected_and_sent_on_event_by_event_has_no_ttft_either() -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        texts = [data for _, data in usual(ask)]
        yield from ((0 if i else 0.7, data) for i, data in enumerate(texts))

    # A busy machine may take longer to send them than any gateway does.
    details = (passes(Kind(pieces=pieces))["streaming"]["detail"] for _ in range(5))
    assert any("buffered on its way?" in detail for detail in details)


def test_a_quick_engine_is_not_taken_for_a_buffer() -> None:
    assert passes(Kind(ttft=0.001, itl=0))["streaming"]["ttft_ms"]


def zeros_first(ask: Ask) -> Iterator[Piece]:
    for wait, data in tokens(ask):
        yield wait, data.replace(b'"choices"', b'"usage":{"completion_tokens":0},"choices"')
    yield 0, ask.last_usage()
    yield 0, DONE


def zeros_last(ask: Ask) -> Iterator[Piece]:
    *most, done = usual(ask)
    yield from [*most, (0, event({"choices": [], "usage": {"completion_tokens": 0}})), done]


def test_counts_of_zero_are_no_counts() -> None:
    assert "32 tokens" in passes(Kind(pieces=zeros_first))["streaming"]["detail"]
    assert "32 tokens" in passes(Kind(pieces=zeros_last))["streaming"]["detail"]


@pytest.mark.parametrize("where", ["a choice", "x_groq"])
def test_usage_may_be_in(where: str) -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        *most, (_, usage), done = usual(ask)
        said = {"usage": json.loads(usage[6:])["usage"]}
        choice = {"index": 0, "delta": {}}
        yield from most
        yield 0, event({"choices": [{**choice, **said}]} if where == "a choice" else {where: said})
        yield done

    assert "32 tokens" in passes(Kind(ttft=0, itl=0, pieces=pieces))["streaming"]["detail"]


@pytest.mark.parametrize("held", [False, True])
def test_usage_may_come_after_done(held: bool) -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from tokens(ask)
        yield 0, DONE
        yield 0.2, ask.last_usage()
        yield 9 if held else 0, b""

    assert "32 tokens" in passes(Kind(ttft=0, itl=0, pieces=pieces))["streaming"]["detail"]


def test_events_may_be_wrapped_twice() -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from ((wait, b"data: " + data) for wait, data in usual(ask))

    detail = passes(Kind(pieces=pieces))["streaming"]["detail"]
    assert "32 tokens" in detail and "[DONE]" not in detail


def test_tokens_may_be_counted_in_decimals() -> None:
    def decimals(usage: dict[str, int]) -> dict[str, float]:
        return {name: float(count) for name, count in usage.items()}

    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from tokens(ask)
        yield 0, event({"choices": [], "usage": decimals(ask.usage())})
        yield 0, DONE

    def document(ask: Ask) -> Any:
        return (said := whole(ask)) | {"usage": decimals(said["usage"])}

    passes(Kind(ttft=0, itl=0, pieces=pieces, document=document))


def test_a_list_without_choices_may_be_null() -> None:
    """As Go writes an empty one."""

    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from tokens(ask)
        yield 0, ask.last_usage(choices=None)
        yield 0, DONE

    assert "32 tokens" in passes(Kind(ttft=0, itl=0, pieces=pieces))["streaming"]["detail"]


def test_a_whole_stream_without_done_is_whole() -> None:
    found = passes(Kind(pieces=lambda ask: list(usual(ask))[:-1]))
    assert found["streaming"]["detail"].endswith("but no [DONE] at the end")


def test_a_stream_that_breaks_off_is_not() -> None:
    def pieces(ask: Ask) -> list[Piece]:
        return list(usual(ask))[:5]

    code, found, _ = checks(Kind(pieces=pieces, end=b"", closes=True))
    assert code == 1
    assert found["streaming"]["detail"] == "the answer broke off"


@pytest.mark.parametrize("end", [b"", b"0\r\n"])
def test_done_is_the_end_whatever_becomes_of_the_connection(end: bytes) -> None:
    """A proxy that forgets the last chunk, and leaves the connection open or closes it."""
    passes(Kind(end=end, closes=bool(end)), "--timeout", str(PATIENCE))


def test_an_error_within_the_stream_is_told_in_its_words() -> None:
    def pieces(ask: Ask) -> list[Piece]:
        return [(0, event({"error": {"message": "out of capacity"}})), (0, DONE)]

    _, found, _ = checks(Kind(pieces=pieces))
    assert "out of capacity" in found["streaming"]["detail"]


def test_another_content_type_is_named() -> None:
    _, found, _ = checks(Kind(content_type=b"text/plain"))
    assert "'text/plain' instead of text/event-stream" in found["streaming"]["detail"]


# --- reasoning models -----------------------------------------------------------------------------


def with_usage(**more: Any) -> Kind:
    def document(ask: Ask) -> Any:
        found = whole(ask)
        return {**found, "usage": {**found["usage"], **more}}

    return Kind(document=document)


def test_thoughts_may_count_in_the_total_alone() -> None:
    passes(with_usage(total_tokens=999))


def test_all_tokens_may_go_into_hidden_thoughts() -> None:
    def document(ask: Ask) -> Any:
        found = json.loads(json.dumps(whole(ask)).replace('"one two"', '""'))
        found["usage"]["completion_tokens_details"] = {"reasoning_tokens": 4}
        return found

    passes(Kind(document=document))


def test_thoughts_are_words() -> None:
    def document(ask: Ask) -> Any:
        return json.loads(json.dumps(whole(ask)).replace('"content": "', '"reasoning": "'))

    passes(Kind(document=document))


# --- servers that know less -----------------------------------------------------------------------


def without(*paths: str) -> Answer:
    def answer(request: Request) -> None:
        if request.line.split()[1] in paths:
            request.document({"detail": "Not Found"}, "404 Not Found")
        else:
            Kind()(request)

    return answer


@pytest.mark.parametrize(
    ("paths", "last", "code"),
    [
        (["/health"], "7/8 passed, 1 not served", 0),
        (["/v1/completions"], "4/8 passed, 4 not served", 0),
        (["/v1/chat/completions"], "6/8 passed, 2 not served", 0),
        (["/health", "/v1/models", "/v1/completions"], "2/8 passed, 6 not served", 0),
        (["/v1/completions", "/v1/chat/completions"], "2/8 passed, 6 not served", 1),
    ],
)
def test_what_a_gateway_does_not_serve_is_left_out(paths: list[str], last: str, code: int) -> None:
    got, found, line = checks(without(*paths), "-m", MODEL)
    assert (got, line) == (code, last)
    for check in found.values():
        assert (check["ok"] is None) == (check["detail"] == "status 404 instead of 200: not there")


def test_a_model_for_chats_alone_is_no_fault() -> None:
    """OpenAI's own words."""
    words = "This is a chat model and not supported in the v1/completions endpoint."
    error = {"message": words, "type": "invalid_request_error", "param": "model", "code": None}

    def answer(request: Request) -> None:
        if "prompt" in (request.body or {}):
            request.document({"error": error}, "404 Not Found")
        else:
            Kind()(request)

    code, _, line = checks(answer)
    assert (code, line) == (0, "4/8 passed, 4 not served")


def test_a_model_that_is_not_there_is_no_path_that_is_not_there() -> None:
    def answer(request: Request) -> None:
        if request.body:
            message = f"The model {request.body['model']} does not exist."
            request.document({"error": {"message": message}}, "404 Not Found")
        else:
            Kind()(request)

    code, found, _ = checks(answer)
    assert code == 1
    assert found["chat"]["ok"] is False


@pytest.mark.parametrize(
    ("field", "words", "name"),
    [
        ("top_k", "Unrecognized request argument supplied: top_k", "sampling parameters"),
        ("seed", "seed is not supported by this model", "sampling parameters"),
        ("stream_options", '[{"loc": ["body", "stream_options"]}]', "streaming"),
        ("temperature", "'temperature' does not support 0 with this model", "chat"),
        ("max_tokens", "'max_tokens' is not supported, use 'max_completion_tokens'", "completions"),
    ],
)
def test_what_is_refused_by_name_is_left_out(field: str, words: str, name: str) -> None:
    found = passes(Kind(refuses=lambda body: words if field in body else ""))
    assert f"without {field}" in found[name]["detail"]
    assert f'"{field}"' not in found[name]["curl"]


def test_a_server_that_takes_one_prompt_at_a_time() -> None:
    """As `transformers serve` does."""

    def refuses(body: dict[str, Any]) -> str:
        return "prompt must be a string." if isinstance(body.get("prompt"), list) else ""

    code, found, last = checks(Kind(refuses=refuses))
    assert (code, found["batch"]["ok"], last) == (0, None, "7/8 passed, 1 not served")


def test_without_stream_options_there_need_be_no_counts() -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from tokens(ask)
        yield 0, DONE

    def refuses(body: dict[str, Any]) -> str:
        return "unknown field stream_options" if "stream_options" in body else ""

    assert "uncounted" in passes(Kind(pieces=pieces, refuses=refuses))["streaming"]["detail"]


@pytest.mark.parametrize(
    ("models", "args"),
    [
        ([{"id": MODEL}], ()),
        ({"models": [{"name": MODEL}]}, ()),
        ({"data": [{"model": MODEL}]}, ()),
        ({"data": [MODEL]}, ()),
        ([MODEL], ()),
        ({"data": [{"id": f"{MODEL}:latest"}]}, ("-m", MODEL)),
        ({"data": [MODEL]}, ("-m", f"{MODEL}:nitro")),
        ({"data": ["openai/*", MODEL]}, ()),
        ({"data": ["test-*"]}, ("-m", MODEL)),
    ],
)
def test_lists_of_models(models: Any, args: tuple[str, ...]) -> None:
    passes(Kind(models=models), *args)


@pytest.mark.parametrize(
    ("args", "words"),
    [((), "-m has to name the model"), (("-m", "x/y"), "x/y was asked for, but")],
)
def test_a_pattern_of_names_is_no_model(args: tuple[str, ...], words: str) -> None:
    """LiteLLM's: whatever is behind it, nothing is called `openai/*`."""
    asked = []

    def refuses(body: dict[str, Any]) -> str:
        asked.append(body.get("model"))
        return ""

    _, found, _ = checks(Kind(models={"data": ["openai/*"]}, refuses=refuses), *args)
    detail = found["list models"]["detail"]
    assert words in detail and "openai/*" in detail and "openai/*" not in asked


def test_a_document_may_begin_with_a_byte_order_mark() -> None:
    def answer(request: Request) -> None:
        if request.body and not request.body.get("stream"):
            ask = Ask(Kind(), request)
            data = b"\xef\xbb\xbf" + json.dumps(whole(ask)).encode()
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            request.send(head + chunk(data) + LAST)
        else:
            Kind()(request)

    passes(answer)


def test_a_server_that_leaves_the_connection_open_ends_its_documents_by_their_length() -> None:
    """It has to: `Connection: close` was asked for, and not every server does."""

    def answer(request: Request) -> None:
        assert request.fields["connection"] == "close"
        Kind()(request)

    passes(answer, "--timeout", str(PATIENCE))


def test_early_hints_come_before_the_answer() -> None:
    def answer(request: Request) -> None:
        request.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        request.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        Kind()(request)

    passes(answer)


@pytest.mark.parametrize(("closed", "args"), [(">&-", ()), (">&-", ("--json",)), ("2>&-", ())])
def test_what_is_closed_before_it_begins_changes_no_verdict(
    closed: str, args: tuple[str, ...]
) -> None:
    words = f'"$@" {closed}'
    with running(Kind(itl=0)) as server:
        url = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, str(SCRIPT), "-H", url, *args]
        done = subprocess.run(["sh", "-c", words, "sh", *command], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_closed_stderr_leaves_the_document_alone() -> None:
    with running(Kind(itl=0)) as server:
        url = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, str(SCRIPT), "-H", url, "--json"]
        done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], capture_output=True)
    assert json.loads(done.stdout)["passed"] == 8
