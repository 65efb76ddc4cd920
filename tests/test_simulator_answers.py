"""What the simulator accepts, and the shapes of its answers, where only a close look tells them
from another server's: each line is a thing that the real 1.1.0 does.

Run alone: .venv/bin/pytest tests/test_simulator_answers.py
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path

import pytest
import requests

from tests.conftest import PATIENCE
from tests.test_simulator import MODEL, Json, Server, http_post, is_flat_400, ok, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
NAMED: Json = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}
HEX = "[0-9a-f]{32}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "c.yaml").write_text("return_perf_metrics: true\n")
    flags = ("--max_num_tokens", "100", "--extra_llm_api_options", str(folder / "c.yaml"))
    with serving(folder / "log", MODEL, *flags) as shared:
        yield shared


def post(server: Server, path: str, fields: Json) -> requests.Response:
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": "Hi"}
    return server.post(path, {"model": "m", "max_tokens": 4, **prompt, **fields})


def is_cut(server: Server, path: str, fields: Json) -> bool:
    """Whether a stream begins as if all were well, and ends without its last HTTP chunk."""
    fields = {"messages": [USER], "max_tokens": 4, "stream": True, **fields}
    if path == CHAT:
        data = chat_post(fields)
    else:
        del fields["messages"]
        data = http_post({"prompt": "Hi", **fields}, "connection: close")
    answer = server.exchange(data)
    return answer.startswith(b"HTTP/1.1 200") and not answer.endswith(b"0\r\n\r\n")


def chat_post(fields: Json) -> bytes:
    body = json.dumps({"model": "m", **fields}).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", "connection: close"]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


# -- accepted and refused --

TOO_LONG = (
    "The sum of prompt length (101.0), query length (0) should not exceed max_num_tokens (100)"
)
REFUSED: list[tuple[str, Json, str]] = [
    (COMPLETIONS, {"prompt": [1] * 101}, TOO_LONG),
    (COMPLETIONS, {"prompt": [1] * 101, "stream": True}, TOO_LONG),
    (CHAT, {"messages": [{**USER, "reasoning_content": "x"}]}, "'reasoning_content'"),
    (CHAT, {"messages": [{**USER, "cache_control": {}}]}, "ChatCompletionDeveloperMessageParam"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": None}]}, "tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "CustomChatCompletionMessageParam"),
    (CHAT, {"messages": [{**USER, "name": 5}]}, "valid string"),
    (CHAT, {"messages": [{"role": "tool", "tool_call_id": "1"}]}, "Field required"),
    (CHAT, {"messages": [{"role": "u", "content": [{"type": "x"}]}]}, "Unknown part type: x"),
    (CHAT, {"n": 2}, "Multiple response is not supported in PyTorch workflow"),
    (CHAT, {"n": 2, "stream": True}, "Multiple response"),
    (CHAT, {"n": 0}, "n >= 1"),
    (CHAT, {"logprobs": True, "top_logprobs": 2}, "PyTorch backend currently only supports"),
    (CHAT, {"max_completion_tokens": None}, "'max_completion_tokens'"),
    (CHAT, {"response_format": {"type": "json"}}, "The 'schema' field is required"),
    (COMPLETIONS, {"top_k": -1}, "top_k >= 0"),
    (COMPLETIONS, {"top_p": 0}, "0 < top_p <= 1"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty > 0"),
    (COMPLETIONS, {"min_p": 1.5}, "min_p"),
    (COMPLETIONS, {"top_p_min": 1.5}, "top_p_min"),
    (COMPLETIONS, {"length_penalty": -1}, "length_penalty"),
    (COMPLETIONS, {"seed": -1}, "0 <= seed"),
    (COMPLETIONS, {"min_tokens": 1 << 31}, "32 bits"),
    (COMPLETIONS, {"prompt": [1, 1 << 31]}, "32 bits"),
    (COMPLETIONS, {"top_k": 1, "top_p": 0, "best_of": 2}, "Greedy decoding in the LLM API"),
    (COMPLETIONS, {"best_of": -1}, "best_of (-1) cannot be less than n (1)"),
    (COMPLETIONS, {"echo": True, "prompt": [1]}, 'can only concatenate list (not "str") to list'),
    (COMPLETIONS, {"logit_bias": {"x": 1}}, "Invalid logit_bias key 'x'"),
    (COMPLETIONS, {"logit_bias": {"32000": 1}}, "out of vocabulary range [0, 32000)"),
    (COMPLETIONS, {"logit_bias": {"1": None}}, "valid number"),
    (COMPLETIONS, {"lora_request": {}}, "lora_name"),
    (COMPLETIONS, {"lora_request": {"lora_name": "a", "lora_int_id": 1}}, "does not exist"),
    (COMPLETIONS, {"disaggregated_params": {}}, "request_type"),
    (COMPLETIONS, {"disaggregated_params": {"request_type": "context_only"}}, "transceiver"),
    (CHAT, {"documents": [{"title": 1}]}, "valid string"),
    (
        COMPLETIONS,
        {"response_format": {"type": "structural_tag", "format": {"type": "x"}}},
        "does not match any of the expected tags",
    ),
    (COMPLETIONS, {"max_tokens": 1e30}, "as an integer"),
    (COMPLETIONS, {"max_tokens": "٣"}, "valid integer"),
    (CHAT, {"cache_salt": " "}, "must be a non-empty string"),
    (CHAT, {"messages": [], "prompt_token_ids": [1], "add_generation_prompt": False}, "index out"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "message"), REFUSED)
def test_what_the_real_one_refuses_is_refused(
    server: Server, path: str, fields: Json, message: str
) -> None:
    response = post(server, path, fields)
    assert is_flat_400(response, message), response.text[:2000]


ACCEPTED: list[tuple[str, Json]] = [
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}),
    (CHAT, {"messages": [{"role": "critic", "content": "Hi"}]}),
    (CHAT, {"messages": [{"role": "assistant", "content": None}]}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (COMPLETIONS, {"response_format": {"type": "regex", "regex": "a+"}}),
    (COMPLETIONS, {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}),
    (COMPLETIONS, {"best_of": 0}),
    (COMPLETIONS, {"top_p_min": -1}),
    (COMPLETIONS, {"stop": None, "stop_token_ids": None, "max_tokens": 1 << 40}),
    (COMPLETIONS, {"stream": 0.0, "max_tokens": "5.0", "prompt": ["1"]}),
    (COMPLETIONS, {"prompt": [1.0]}),
    (CHAT, {"reasoning_effort": "Low", "prompt_token_ids": ["1", 1.0, True]}),
]


@pytest.mark.parametrize(("path", "fields"), ACCEPTED)
def test_what_the_real_one_accepts_is_accepted(server: Server, path: str, fields: Json) -> None:
    ok(post(server, path, {"temperature": 0, **fields}))


def test_chunked_prefill_takes_prompts_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("enable_chunked_prefill: true\n")
    with serving(tmp_path / "log", MODEL, "--extra_llm_api_options", f"{tmp_path}/c.yaml") as any_:
        assert any_.complete([1] * 9000, max_tokens=1)["usage"]["prompt_tokens"] == 9000


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"top_k": -1}),
        (COMPLETIONS, {"temperature": -1}),
        (COMPLETIONS, {"top_p": 1.5}),
        (COMPLETIONS, {"max_tokens": -1}),
        (COMPLETIONS, {"echo": True, "prompt": [1]}),
        (COMPLETIONS, {"disaggregated_params": {"request_type": "context_only"}}),
        (CHAT, NAMED),
    ],
)
def test_what_only_a_worker_refuses_cuts_a_stream(server: Server, path: str, fields: Json) -> None:
    assert is_cut(server, path, fields)
    assert not is_cut(server, path, {"temperature": 0})


# -- bodies that are no JSON objects --

BODY = b'{"model": "m", "prompt": "Hi", "max_tokens": 1}'
CRASHES = [(BODY, "text/plain"), (BODY, "application/x-www-form-urlencoded")]
CRASHES += [(body, "application/json") for body in (b"[]", b'"x"', b"5", b"true")]


def send(server: Server, body: bytes, *headers: str) -> tuple[str, str]:
    """Return the head and the body of the answer."""
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "host: x", "connection: close", *headers]
    lines.append(f"content-length: {len(body)}")
    answer = server.exchange("\r\n".join([*lines, "", ""]).encode() + body).decode()
    head, _, text = answer.partition("\r\n\r\n")
    return head, text


@pytest.mark.parametrize(("body", "content_type"), CRASHES)
def test_a_body_that_is_no_object_is_an_internal_error(
    server: Server, body: bytes, content_type: str
) -> None:
    head, text = send(server, body, f"content-type: {content_type}")
    assert head.startswith("HTTP/1.1 500") and "content-type: text/plain" in head
    assert text == "Internal Server Error"


def test_so_are_top_logprobs_that_are_no_number(server: Server) -> None:
    assert post(server, CHAT, {"top_logprobs": "2"}).status_code == 500


@pytest.mark.parametrize("body", [b'{"model": "\xff"}', b"[" * 100_000])
def test_a_body_that_cannot_be_read_at_all_gets_fastapis_words(server: Server, body: bytes) -> None:
    _, text = send(server, body, "content-type: application/json")
    assert text == '{"detail":"There was an error parsing the body"}'


@pytest.mark.parametrize("headers", [[], ["content-type:"], ["content-type: application/ld+json"]])
def test_a_body_without_a_type_is_json(server: Server, headers: list[str]) -> None:
    assert send(server, BODY, *headers)[0].startswith("HTTP/1.1 200")


@pytest.mark.parametrize("body", [b"", b"null"])
def test_no_body_is_a_missing_one(server: Server, body: bytes) -> None:
    head, text = send(server, body, "content-type: application/json")
    assert head.startswith("HTTP/1.1 400") and "Field required" in text


def test_there_is_no_limit_to_a_body(server: Server) -> None:
    padded = BODY[:-1] + b" " * (70 << 20) + b"}"
    assert send(server, padded, "content-type: application/json")[0].startswith("HTTP/1.1 200")


# -- shapes --


def lines_of(server: Server, path: str, **fields: object) -> list[str]:
    return post(server, path, {"temperature": 0, "stream": True, **fields}).text.split("\n\n")


def test_a_streamed_completion_is_spelled_as_the_real_one(server: Server) -> None:
    first, *_, usage, done, end = lines_of(
        server, COMPLETIONS, prompt="1, 2,", stream_options={}, max_tokens=2
    )
    counts = '{"prompt_tokens":4,"total_tokens":5,"completion_tokens":1}'
    assert re.fullmatch(
        rf'data: {{"id":"cmpl-{HEX}","object":"text_completion","created":\d+,"model":"m",'
        r'"choices":\[{"index":0,"text":" 3","token_ids":null,"logprobs":null,'
        r'"finish_reason":null,"stop_reason":null,"avg_decoded_tokens_per_iter":1.0}\],'
        rf'"usage":{counts}}}',
        first,
    )
    assert re.fullmatch(
        rf'data: {{"id":"chatcmpl-{HEX}","object":"chat.completion.chunk","created":\d+,'
        r'"model":"m","choices":\[\],"usage":{.*"completion_tokens":2}}',
        usage,
    )
    assert (done, end) == ("data: [DONE]", "")


def test_a_streamed_chat_is_spelled_as_the_real_one(server: Server) -> None:
    options = {"include_usage": True}
    role, first, last, _, done, _ = lines_of(
        server, CHAT, messages=[{"role": "user", "content": "count from 5 to 9"}],
        stream_options=options, max_tokens=2,
    )  # fmt: skip
    head = rf'data: {{"id":"chatcmpl-{HEX}","object":"chat.completion.chunk","created":\d+,'
    head += r'"model":"m","choices":\[{"index":0,"delta":{'
    assert re.fullmatch(
        head + r'"role":"assistant"}}\],"usage":{"prompt_tokens":12,"total_tokens":12,'
        r'"completion_tokens":0}} ',  # with a space at its end
        role,
    )
    delta = r'"reasoning_content":""}'
    number = r'"avg_decoded_tokens_per_iter":1.0}\],"usage":{.*'
    assert re.fullmatch(head + rf'"content":"5",{delta},{number}"completion_tokens":1}}}}', first)
    ending = r'"finish_reason":"length",'
    assert re.fullmatch(
        head + rf'"content":",",{delta},{ending}{number}"completion_tokens":2}}}}', last
    )
    assert done == "data: [DONE]"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_without_stream_options_nothing_is_counted(server: Server, path: str) -> None:
    events = [json.loads(line[6:]) for line in lines_of(server, path)[:-2]]
    assert [event.get("usage", "no key") for event in events] == (
        ["no key"] * 5 if path == CHAT else [None] * 4
    )


def test_each_prompt_of_a_stream_has_its_own_usage(server: Server) -> None:
    events = server.events(COMPLETIONS, prompt=[[1], [1, 2, 3]], max_tokens=2, stream_options={})
    usages = [event["usage"] for event in events if not event["choices"]]
    assert sorted(usage["prompt_tokens"] for usage in usages) == [1, 3]
    assert {usage["completion_tokens"] for usage in usages} == {2}


def test_a_whole_completion_has_the_real_ones_keys(server: Server) -> None:
    answer = server.complete("Hi")
    assert [*answer] == "id object created model choices usage prompt_token_ids".split()
    assert [*answer["choices"][0]] == (
        "index text token_ids logprobs context_logits finish_reason stop_reason "
        "disaggregated_params avg_decoded_tokens_per_iter"
    ).split()
    assert [*answer["usage"]] == ["prompt_tokens", "total_tokens", "completion_tokens"]
    assert answer["prompt_token_ids"] is None


def test_several_prompts_are_answered_under_the_servers_name(server: Server) -> None:
    answer = server.complete(["a", "b"], model="x")
    assert (answer["model"], answer["prompt_token_ids"]) == (MODEL, [])


def test_a_whole_chat_has_the_real_ones_keys(server: Server) -> None:
    answer = server.chat()
    assert [*answer] == "id object created model choices usage prompt_token_ids".split()
    (choice,) = answer["choices"]
    assert [*choice] == (
        "index message logprobs finish_reason stop_reason mm_embedding_handle "
        "disaggregated_params avg_decoded_tokens_per_iter"
    ).split()
    message = choice["message"]
    assert [*message] == "role content reasoning_content reasoning tool_calls".split()
    assert (message["reasoning_content"], message["reasoning"]) == ("", None)


def test_a_named_tool_is_called_with_whatever_the_model_says(server: Server) -> None:
    message = server.chat(**NAMED)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert re.fullmatch(f"chatcmpl-tool-{HEX}", call["id"])
    assert call["function"]["name"] == "f" and call["function"]["arguments"]
    assert message["content"] == ""


@pytest.mark.parametrize("top", [0, 1])
def test_logprobs_come_one_a_token(server: Server, top: int) -> None:
    fields: Json = {"logprobs": True, "top_logprobs": top, "max_tokens": 3}
    content = server.chat(**fields)["choices"][0]["logprobs"]["content"]
    assert [*content[0]] == ["token", "logprob", "bytes", "top_logprobs"]
    assert len(content) == 3 and bool(content[0]["top_logprobs"]) == bool(top)
    events = server.events(CHAT, messages=[USER], **fields)
    streamed = [event["choices"][0]["logprobs"]["content"] for event in events[1:]]
    assert [len(tokens) for tokens in streamed] == [1, 1, 1]


def test_an_echoed_chat_goes_on_with_the_last_message(server: Server) -> None:
    last = {"role": "assistant", "content": "Well,"}
    fields: Json = {"messages": [USER, last], "echo": True}
    answer = ok(post(server, CHAT, fields))
    assert answer["choices"][0]["message"]["content"].startswith("Well,")
    deltas = [event["choices"][0]["delta"] for event in server.events(CHAT, **fields, max_tokens=1)]
    assert deltas[:2] == [{"role": "assistant"}, {"content": "Well,"}]


def test_a_stop_that_is_a_token_does_not_count(server: Server) -> None:
    """Matched by ids first: then its tokens are taken out; in the text only: they count."""
    assert server.complete("1, 2,", stop=" 5")["usage"]["completion_tokens"] == 4
    assert server.complete("1, 2,", stop="5")["usage"]["completion_tokens"] == 5
    kept = server.complete("1, 2,", stop=" 5", include_stop_str_in_output=True)
    assert kept["usage"]["completion_tokens"] == 5


def test_the_list_of_models_is_made_anew_at_every_call(server: Server) -> None:
    def created() -> int:
        return int(ok(server.get("/v1/models"))["data"][0]["created"])

    first = created()
    time.sleep(1.1)
    assert created() > first


# -- routes and HTTP --


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"])
def test_fastapis_own_pages_are_there(server: Server, path: str) -> None:
    assert server.get(path).status_code == 200


def test_small_routes_of_the_real_one_are_there(server: Server) -> None:
    assert {*ok(server.get("/steady_clock_offset"))} == {"receive_ts", "transmit_ts"}
    assert server.post("/steady_clock_offset", {"offset": 1.5}).status_code == 200
    assert server.get("/prometheus/metrics").headers["content-type"].startswith("text/plain")
    assert server.get("/v1/mod%65ls").status_code == 200
    harmony = server.post("/v1/responses", {"model": "m", "input": "x"})
    assert is_flat_400(harmony, "Responses API only supports harmony format for now")
    assert is_flat_400(server.post("/v1/responses", {"model": "m"}), "Field required")


def test_a_trailing_slash_is_redirected_to_the_full_address(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    response = requests.get(f"{url}/v1/models/?a=1", allow_redirects=False, timeout=PATIENCE)
    assert (response.status_code, response.headers["location"]) == (307, f"{url}/v1/models?a=1")
    assert "date" in response.headers


def test_an_empty_queue_of_statistics_is_waited_for(server: Server) -> None:
    server.complete()
    assert server.get("/metrics").elapsed.total_seconds() >= 2


def test_iterations_are_told_once_where_the_yaml_asks_for_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("enable_iter_perf_stats: true\n")
    flags = ("--extra_llm_api_options", str(tmp_path / "c.yaml"))
    with serving(tmp_path / "log", MODEL, *flags) as server:
        server.complete()
        told = server.get("/metrics").json()
        assert told and {*told[0]} == {"numActiveRequests", "numQueuedRequests"}
        assert server.get("/metrics").json() == []


def test_a_client_library_notices_the_cut(server: Server) -> None:
    with pytest.raises((requests.exceptions.ChunkedEncodingError, IncompleteRead)):
        post(server, COMPLETIONS, {"top_k": -1, "stream": True})
