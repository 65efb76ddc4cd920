"""Servers that know less than TensorRT-LLM, vLLM or SGLang: bench.py goes on with what works."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure
from load import endpoint
from load.endpoint import Endpoint
from load.probe import explore
from tests.loopback import DONE, MODEL, Answer, Request, Server, model_server, obedient, serving
from tests.servers import MODELS, Ask, Kind, Piece, Said, bench, running, tokens, usual

pytestmark = [
    pytest.mark.usefixtures("clean_environment", "same_signals", "any_machine"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(
    clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)


def bodies(server: Server) -> list[dict[str, Any]]:
    return [r.body for r in server.requests if r.body]


def run(kind: Answer, *args: str) -> tuple[Said, Server]:
    with running(kind) as server:
        said = bench(server, *args)
    return said, server


# --- fields that are refused ----------------------------------------------------------------------


def refuses(*names: str, words: str = "Unrecognized request argument") -> Kind:
    """As a strict server does: no field that it does not know."""
    return Kind(refuses=lambda body: words if set(names) & set(body) else "")


def text_only(body: dict[str, Any]) -> str:
    ids = isinstance(body.get("prompt"), list)
    return "json: cannot unmarshal array into field prompt of type string" if ids else ""


def with_usage_anyway(ask: Ask) -> Iterator[Piece]:
    """Mistral's: no stream_options, and the counts in the last chunk."""
    *first, (wait, _) = tokens(ask)
    yield from first
    yield wait, ask.event(" w", "length", usage=ask.usage())
    yield 0, DONE


REFUSALS = {
    "ignore_eos": (refuses("ignore_eos"), (), "refuses ignore_eos: outputs may end early"),
    "stream_options": (
        replace(refuses("stream_options"), pieces=with_usage_anyway), (), "refuses stream_options",
    ),
    "temperature": (refuses("temperature"), (), "refuses temperature 0"),
    "without a word of what it was": (
        replace(refuses("ignore_eos", "stream_options", words="Bad Request"),
                pieces=with_usage_anyway),
        (), "refuses stream_options",
    ),
    "prompts of token ids": (Kind(refuses=text_only), (), "refuses token ids as a prompt"),
    "max_tokens": (
        refuses("max_tokens", words="use 'max_completion_tokens' instead"),
        ("--backend", "openai-chat"), "refuses max_tokens: max_completion_tokens is sent",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "args", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_left_out(kind: Kind, args: tuple[str, ...], words: str) -> None:
    said, server = run(kind, *args)
    assert said.code == 0, said.said
    assert words in said.notes
    assert not any(kind.refuses(body) for body in bodies(server)[-4:])


def test_only_what_is_refused_for_itself_is_left_out() -> None:
    _, server = run(refuses("ignore_eos", words="Bad Request"))
    last = bodies(server)[-1]
    assert set(last) == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert isinstance(last["prompt"], list)


def test_the_length_of_a_text_is_the_servers_to_say() -> None:
    """It counts a token more for each prompt: the run is none the worse for that."""

    def pieces(ask: Ask) -> Iterator[Piece]:
        counts = {"prompt_tokens": ask.prompt + 1, "completion_tokens": ask.wanted}
        return itertools.chain(tokens(ask), [(0, ask.last_usage(usage=counts)), (0, DONE)])

    said, _ = run(Kind(refuses=text_only, pieces=pieces))
    assert said.code == 0, said.said


def test_what_every_request_is_refused_for_is_told() -> None:
    said, _ = run(Kind(refuses=lambda _: "the model is not loaded"))
    assert said.code == 1
    assert "no answer to a short request: HTTP 400: the model is not loaded" in said.said


def test_a_server_may_insist_on_a_longer_answer() -> None:
    """OpenRouter, of models that another API of OpenAI's serves, and gateways like it."""
    few = "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16"
    asked = ("max_tokens", "max_completion_tokens")
    kind = Kind(refuses=lambda body: few * any(body.get(name, 16) < 16 for name in asked))
    said, _ = run(kind, "--output-len", "20")
    assert said.code == 0, said.said
    assert "refuses" not in said.notes


@pytest.mark.parametrize("status", ["429 Too Many Requests", "502 Bad Gateway", "524 A Timeout"])
def test_a_busy_moment_is_not_taken_for_a_refusal(status: str) -> None:
    first = itertools.count()

    def answer(request: Request) -> None:
        if request.body and next(first) == 0:
            request.document({"error": {"message": "slow down"}}, status)
        else:
            Kind()(request)

    said, server = run(answer)
    assert said.code == 0, said.said
    assert "ignore_eos" in bodies(server)[-1]
    assert "2 to find out what the server understands" in said.notes


@pytest.mark.parametrize("status", ["429 Too Many", "503 Loading"])
def test_a_server_that_says_when_is_asked_again_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    """What it answers then tells what it takes; the status does not."""
    waits: list[float] = []
    monkeypatch.setattr("load.probe.time.sleep", waits.append)
    strict, seen = refuses("ignore_eos"), itertools.count()

    def answer(request: Request) -> None:
        if next(seen) % 2 == 0:
            fields = "Retry-After: 3\r\n"
            request.document({"error": {"message": "slow"}}, status, fields)
        else:
            strict(request)

    with serving(answer) as server:
        found = explore(Endpoint(f"http://127.0.0.1:{server.port}", MODEL, MODEL), False, 60.0)
    assert not found.error and not found.dialect.ignore_eos and found.dialect.stream_options
    assert 3.0 in waits
    assert f"too busy to answer (HTTP {status[:3]}): asking again in 3 s" in capsys.readouterr().err


def test_a_server_that_says_at_once_is_given_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("load.probe.time.sleep", waits.append)

    def answer(request: Request) -> None:
        request.document({"error": "slow"}, "429 Too Many", "Retry-After: 0\r\n")

    with serving(answer) as server:
        explore(Endpoint(f"http://127.0.0.1:{server.port}", MODEL, MODEL), False, 60.0)
    assert list(filter(None, waits))[:3] == [1, 2, 4]


# --- fields that are ignored ----------------------------------------------------------------------


def ignores(name: str, otherwise: int) -> Kind:
    def pieces(ask: Ask) -> Iterator[Piece]:
        body = {k: v for k, v in ask.body.items() if k != name}
        count = int(body.get("max_tokens") or body.get("max_completion_tokens") or otherwise)
        return itertools.chain(tokens(ask, count), [(0, ask.last_usage(count)), (0, DONE)])

    return Kind(itl=0.001, pieces=pieces)


@pytest.mark.parametrize("otherwise", [16, 2000])
def test_the_length_field_that_works_is_sent(otherwise: int) -> None:
    """A server with a default of its own, and one that writes until it is stopped."""
    said, server = run(ignores("max_tokens", otherwise), "--backend", "openai-chat")
    assert said.code == 0, said.said
    assert "ignores max_tokens: max_completion_tokens is sent" in said.notes
    assert bodies(server)[-1]["max_completion_tokens"] == 8


def test_a_chat_server_that_knows_the_older_name_gets_it() -> None:
    said, _ = run(ignores("max_completion_tokens", 200), "--backend", "openai-chat")
    assert said.code == 0, said.said


def test_a_server_that_ignores_every_limit_makes_no_valid_run() -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        return itertools.chain(tokens(ask, 20), [(0, ask.last_usage(20)), (0, DONE)])

    said, _ = run(Kind(itl=0.001, pieces=pieces))
    assert said.code == 1
    assert "writes more than max_tokens allows" in said.said
    assert "4 outputs are not 8 tokens long (one has 20)" in said.run["problems"][0]


def ends_at(count: int, finish: str) -> Callable[[Ask], Iterator[Piece]]:
    def pieces(ask: Ask) -> Iterator[Piece]:
        for i in range(count):
            yield 0.005, ask.event(f" w{i}", finish if i == count - 1 else None)
        yield 0, ask.last_usage(count)
        yield 0, DONE

    return pieces


@pytest.mark.parametrize("finish", ["stop", "eos"])
def test_an_end_of_sequence_that_ignore_eos_did_not_stop_is_a_note(finish: str) -> None:
    said, _ = run(Kind(pieces=ends_at(5, finish)))
    assert said.code == 0, said.said
    assert "ignores ignore_eos: 4 of 4 outputs ended early, after 5 tokens" in said.notes


def test_an_output_that_the_server_cut_short_is_none() -> None:
    said, _ = run(Kind(pieces=ends_at(5, "length")))
    assert said.run["problems"] == ["4 outputs are not 8 tokens long (one has 5)"]


@pytest.mark.parametrize("finish", ["timeout", "insufficient_system_resource"])
def test_an_output_that_the_server_gave_up_is_an_error(finish: str) -> None:
    """TensorRT-LLM and DeepSeek call it so."""
    said, _ = run(Kind(pieces=ends_at(5, finish)))
    assert f"the server ended the answer: finish_reason {finish!r}" in said.run["problems"][0]


def test_a_prompt_that_is_cut_short_is_a_note() -> None:
    """Ollama does so in silence, when a prompt is longer than its context."""

    def pieces(ask: Ask) -> Iterator[Piece]:
        body = {**ask.body, "messages": [{"content": "only four words left"}]}
        cut = replace(ask, request=replace(ask.request, body=body))
        return usual(cut)

    said, _ = run(Kind(pieces=pieces), "--backend", "openai-chat")
    assert said.code == 0, said.said
    assert "counts 4 tokens in a prompt of 16 words" in said.notes


def test_a_name_that_is_shown_in_part_is_no_alias() -> None:
    name = "a  very " + "long" * 99
    with running(
        Kind(models={"data": [{"id": name}]}, pieces=answers_as(lambda _: name).pieces)
    ) as s:
        found = explore(Endpoint(f"http://127.0.0.1:{s.port}", name, name), False, 60.0)
    assert not found.error and not found.notes


# --- the model's name -----------------------------------------------------------------------------

BEHIND = "org/model-8b-2026-01-01"


def answers_as(name: Callable[[Ask], str]) -> Kind:
    def pieces(ask: Ask) -> Iterator[Piece]:
        for wait, data in usual(ask):
            yield wait, data.replace(json.dumps(MODEL).encode(), json.dumps(name(ask)).encode())

    return Kind(pieces=pieces)


@pytest.mark.parametrize("args", [(), ("-m", MODEL)])
def test_the_model_behind_an_alias_is_a_note(args: tuple[str, ...]) -> None:
    said, _ = run(answers_as(lambda _: BEHIND), *args)
    assert said.code == 0, said.said
    assert f"the answers name {BEHIND}, not {MODEL} as asked" in said.notes


def test_a_model_that_changes_meanwhile_makes_the_run_invalid() -> None:
    """A gateway that falls back to another one."""
    said, _ = run(answers_as(lambda ask: BEHIND if ask.request.number < 8 else "org/fallback"))
    first = f"{BEHIND}, which answered for {MODEL} at first"
    assert said.run["problems"] == [f"answers came from org/fallback, not from {first}"]


def not_found(request: Request) -> None:
    request.document({"detail": "Not Found"}, "404 Not Found")


LISTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none": (not_found, ("-m", MODEL)),
    "an empty one": ({"data": []}, ("-m", MODEL)),
    "a page of HTML": (
        lambda request: request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"),
        ("-m", MODEL),
    ),
    "a bare array": ([{"id": MODEL}], ()),
    "another name for it": ({"models": [{"name": MODEL}]}, ()),
    "another name for the name": ({"data": [{"model": MODEL}]}, ()),
    "only names": ({"data": [MODEL]}, ()),
    "an array of names": ([MODEL], ()),
    "a tag that nobody types": ({"data": [{"id": f"{MODEL}:latest"}]}, ("-m", MODEL)),
    "what OpenRouter has a variant of": (MODELS, ("-m", f"{MODEL}:nitro")),
    "a pattern": ({"data": [{"id": "test*"}]}, ("-m", MODEL)),
}


NO_LISTS: dict[str | int, bytes] = {
    **{status: b"HTTP/1.1 %d\r\nContent-Length: 0\r\n\r\n" % status
       for status in (307, 400, 401, 406, 410, 422, 429, 200)},
    "OK": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK",
    "a status": b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}',
    "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b",
    "too late": b"",
}  # fmt: skip


@pytest.mark.parametrize("sends", NO_LISTS.values(), ids=map(str, NO_LISTS))
def test_a_name_does_without_a_list(sends: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> None:
        request.send(sends) if sends else threading.Event().wait(0.2)

    if not sends:
        monkeypatch.setattr(endpoint, "TIMEOUT", 0.1)
    with serving(answer) as server:
        nameless = Endpoint(f"http://127.0.0.1:{server.port}", "", "")
        named = endpoint.with_model(nameless, MODEL)
        assert named.model == MODEL and "no list of models" in named.unlisted
        with pytest.raises(Failure) as failure:
            endpoint.with_model(nameless, "")
        assert failure.value.hint


@pytest.mark.parametrize("path", ["/a/v4", "/a/v4/chat/completions"])
def test_an_api_may_have_another_version_than_v1(path: str) -> None:
    served = model_server(obedient)

    def answer(request: Request) -> None:
        if re.search(" /a/v4/(models|completions|chat/completions) ", request.line):
            request.line = request.line.replace("/a/v4/", "/v1/")
            served(request)
        else:
            request.document({}, "404 Not Found")

    with serving(answer) as server:
        said = bench(server, url=f"http://127.0.0.1:{server.port}{path}")
    assert (said.code, said.run["completed"]) == (0, 4), said.said


@pytest.mark.parametrize(("models", "args"), LISTS.values(), ids=LISTS)
def test_lists_of_models(models: Any, args: tuple[str, ...]) -> None:
    said, _ = run(Kind(models=models), *args)
    assert said.code == 0, said.said


def test_a_name_that_no_list_confirms_is_noted() -> None:
    said, _ = run(Kind(models=not_found), "-m", MODEL)
    assert "no list of models" in said.notes


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (LISTS["a page of HTML"][0], "/v1/models is HTML, not JSON: a login page, or another"),
        (not_found, "-m NAME works without the list of models"),
    ],
)
def test_without_a_list_and_without_a_name(models: Any, words: str) -> None:
    said, _ = run(Kind(models=models))
    assert said.code == 1
    assert words in said.err


# --- where nothing works, the flag that does ------------------------------------------------------


def serves_only(path: str, otherwise: Answer = not_found) -> Answer:
    def answer(request: Request) -> None:
        wrong = request.body and f" {path} " not in request.line
        otherwise(request) if wrong else Kind()(request)

    return answer


def no_such_thing(status: str) -> Answer:
    return lambda request: request.document({"error": "no such thing"}, status)


PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"
OTHERWISE: dict[str, Answer] = {
    **{s: no_such_thing(f"{s} No") for s in ("404", "405", "400", "501", "403", "200")},
    "a page of HTML": lambda request: request.send(PAGE),
    "no answer at all": Request.hang_up,
}


@pytest.mark.parametrize("otherwise", OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize(
    ("path", "backend", "other"),
    [
        ("/v1/chat/completions", "openai", "openai-chat"),
        ("/v1/completions", "openai-chat", "openai"),
    ],
)
def test_the_api_that_is_there_is_named(
    path: str, backend: str, other: str, otherwise: Answer
) -> None:
    said, _ = run(serves_only(path, otherwise), "--backend", backend)
    assert said.code == 1
    assert f"next: use --backend {other}: the server answers {path}" in said.err


def test_a_name_that_the_server_does_not_know_either() -> None:
    def answer(request: Request) -> None:
        not_found(request)

    said, _ = run(answer, "-m", "nonsense")
    assert "next: -m: is nonsense what the server calls its model?" in said.err


def test_where_neither_api_is_allowed_the_key_is_missing() -> None:
    said, _ = run(Kind(answers=no_such_thing("403 Forbidden")))
    assert "next: set OPENAI_API_KEY" in said.err


def test_of_several_models_the_first_may_write_no_text() -> None:
    """A list that begins with a model for embeddings."""
    refuses = lambda body: "does not support generate" if body["model"] != MODEL else ""  # noqa: E731
    models = {"data": [{"id": "bge-m3"}, {"id": MODEL}]}
    said, _ = run(Kind(models=models, refuses=refuses))
    assert f"next: -m: it also serves {MODEL}" in said.err


# --- --check --------------------------------------------------------------------------------------


def test_check_tells_what_would_be_sent_and_sends_no_load() -> None:
    said, server = run(refuses("ignore_eos"), "--check", "--num-prompts", "400", "-t", "latency")
    assert said.code == 0
    assert len(bodies(server)) == said.last["probes"] < 10
    assert {body["max_tokens"] for body in bodies(server)} == {8}
    assert (said.last["ignore_eos"], said.last["stream_options"]) == (False, True)
    assert [r["num_prompts"] for r in said.last["runs"]] == [400]
    assert said.last["requests"] == 400 + 2
    assert "latency-in16-out8-c2: 400, after 2 of warm-up" in said.out
    assert "refuses ignore_eos" in said.out
    assert not Path("results").exists()


def test_check_of_a_server_that_does_not_answer() -> None:
    said, _ = run(serves_only("/v1/chat/completions"), "--check")
    assert said.code == 1
    assert "--backend openai-chat" in said.out
    assert not said.last["valid"]


def test_check_names_a_load_that_is_not_what_it_is_called() -> None:
    said, _ = run(Kind(), "--check", "-t", "concurrency,sharegpt", "--concurrency", "8")
    assert "no more than 4 of 8 streams are in flight" in said.out
    assert "--input-len and --output-len do not apply" in said.out
    assert "ShareGPT.json is missing" in said.out
    assert not Path("ShareGPT.json").exists()


# --- loads that are not what their name says ------------------------------------------------------


def test_fewer_requests_than_streams_is_a_note() -> None:
    said, _ = run(Kind(), "--concurrency", "2,8")
    assert said.code == 0
    assert said.notes.count("streams are in flight") == 1


def test_a_rate_that_waits_for_streams_is_a_note() -> None:
    said, _ = run(Kind(), "--concurrency", "1", "--request-rate", "500")
    assert "on average for one of the 1 streams: the server did not get 500 req" in said.notes
