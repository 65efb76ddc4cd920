"""Reading one answer: framing, events, times. Pure functions, every cut of the bytes."""

from __future__ import annotations

from typing import Any

import pytest

from common.ask import authority
from common.response import Malformed, Reply, error_message, parse_head
from load.answer import Outcome, read_reply
from load.target import Target
from tests.loopback import DONE, HEAD, LAST, chunk, delta, event, stream, token, usage

MS = 1_000_000


def reply_of(*pieces: bytes) -> Reply:
    """A reply whose n-th piece came at n ms; it must be whole at the last piece only."""
    reply = Reply()
    for n, piece in enumerate(pieces):
        whole = reply.add(piece, n * MS, n * MS)
        assert whole == (n == len(pieces) - 1)
    return reply


def read(*pieces: bytes, chat: bool = False) -> Outcome:
    return read_reply(reply_of(*pieces), Outcome(0, 0, 0), chat)


def test_times_are_those_of_each_events_packet() -> None:
    out = read(
        HEAD, *(chunk(e) for e in (token(), token(), token(), usage(4, 3))), chunk(DONE) + LAST
    )
    assert (out.first, out.last, list(out.gaps)) == (1 * MS, 3 * MS, [1.0, 1.0])
    assert (out.prompt_tokens, out.output_tokens, out.events) == (4, 3, 3)
    assert not out.error
    assert out.has_text


@pytest.mark.parametrize("cut", range(1, len(stream())))
def test_an_answer_is_whole_at_its_last_byte_wherever_it_is_cut(cut: int) -> None:
    whole = stream()
    out = read(whole[:cut], whole[cut:])
    assert (out.error, out.output_tokens, out.events) == ("", 3, 3)


def test_byte_by_byte() -> None:
    out = read(*(bytes([b]) for b in stream()))
    assert (out.error, out.output_tokens) == ("", 3)
    assert out.first < out.last


def test_an_event_counts_when_its_last_byte_is_there() -> None:
    half, rest = chunk(token())[:30], chunk(token())[30:]
    out = read(HEAD + half, rest, chunk(usage(1, 1)) + chunk(DONE) + LAST)
    assert out.first == 1 * MS


def test_an_event_may_be_spread_over_chunks() -> None:
    text = token()
    out = read(HEAD, chunk(text[:20]), chunk(text[20:] + usage(1, 1)), chunk(DONE) + LAST)
    assert (out.error, out.first, out.output_tokens) == ("", 2 * MS, 1)


def test_several_tokens_in_a_chunk_are_counted_by_usage() -> None:
    out = read(
        HEAD + chunk(token(" a b c d")), chunk(token(" e") + usage(2, 5)), chunk(DONE) + LAST
    )
    assert (out.events, out.output_tokens) == (2, 5)


def test_events_that_one_read_brought_are_counted() -> None:
    out = read(HEAD + chunk(token()) + chunk(token()), chunk(token()), chunk(DONE) + LAST)
    assert (out.events, out.merged, list(out.gaps)) == (3, 1, [0.0, 1.0])


def test_events_sent_in_pairs_are_merged_but_not_blurred() -> None:
    pair = chunk(token()) + chunk(token())
    out = read(HEAD + pair, pair, pair, pair, chunk(usage(1, 8)) + chunk(DONE) + LAST)
    assert (out.merged, out.blurred) == (4, 0)


def test_events_that_waited_for_each_other_are_blurred() -> None:
    reply = Reply()
    times = (0, 10, 20, 30, 70, 80)
    for at in times:
        reply.add((HEAD if at == 0 else b"") + chunk(token()) * (4 if at == 70 else 1), at * MS, 0)
    reply.add(chunk(usage(1, 9)) + chunk(DONE) + LAST, 80 * MS, 0)
    out = read_reply(reply, Outcome(0, 0, 0), False)
    assert (out.events, out.merged, out.blurred) == (9, 3, 3)


@pytest.mark.parametrize(
    ("events", "late", "blurred"), [(1, 50, False), (3, 0, False), (3, 0.5, False), (3, 50, True)]
)
def test_first_tokens_read_late_together_are_blurred(
    events: int, late: float, blurred: bool
) -> None:
    """A server may send several at once; only a client that was late blurs the first one's time."""
    reply = Reply()
    reply.add(HEAD + chunk(token()) * events, 50 * MS, int((50 + late) * MS))
    for at in range(60, 110, 10):
        reply.add(chunk(token()), at * MS, at * MS)
    reply.add(chunk(usage(1, events + 5)) + chunk(DONE) + LAST, 120 * MS, 120 * MS)
    assert read_reply(reply, Outcome(0, 0, 0), False).first_blurred is blurred


def test_a_body_with_content_length() -> None:
    body = token() + token() + usage(1, 2) + DONE
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    out = read(head, body[:90], body[90:])
    assert (out.error, out.output_tokens) == ("", 2)


def test_crlf_events_and_pings() -> None:
    events = [e.replace(b"\n", b"\r\n") for e in (token(), token(), usage(1, 2), DONE)]
    out = read(HEAD + chunk(b": ping\r\n\r\n"), *(chunk(e) for e in events), LAST)
    assert (out.error, out.events, out.output_tokens) == ("", 2, 2)


def test_what_looks_like_the_end_in_the_middle_of_a_chunk_is_not() -> None:
    text = b": 0\r\n\r\n" + (token() + usage(1, 1) + DONE).replace(b"\n", b"\r\n")
    raw = HEAD + chunk(text)
    at = raw.index(b": 0\r\n\r\n") + 7
    out = read(raw[:at], raw[at:] + LAST)
    assert (out.error, out.output_tokens) == ("", 1)


def test_trailers_and_chunk_extensions() -> None:
    body = token() + usage(1, 1) + DONE
    out = read(HEAD, b"%x;name=value\r\n%s\r\n" % (len(body), body), b"0\r\nX-Trailer: 1\r\n\r\n")
    assert (out.error, out.output_tokens) == ("", 1)


def test_json_may_be_spaced_in_any_way() -> None:
    for spaced in (b'"choices": [{', b'"choices" : [ {'):
        events = (token() + token()).replace(b'"choices":[{', spaced)
        out = read(HEAD + chunk(events) + chunk(usage(1, 2)) + chunk(DONE) + LAST)
        assert (out.error, out.events, out.output_tokens) == ("", 2, 2)


def test_interim_responses_are_stepped_over() -> None:
    out = read(b"HTTP/1.1 100 Continue\r\n\r\n", stream())
    assert (out.error, out.output_tokens) == ("", 3)


def test_a_chats_role_is_no_token() -> None:
    out = read(
        HEAD + chunk(delta(role="assistant", content="")),
        chunk(delta(content="a")),
        chunk(delta(content="b")),
        chunk(delta(finish="stop")),
        chunk(usage(3, 2)) + chunk(DONE) + LAST,
        chat=True,
    )
    assert (out.first, out.last, list(out.gaps), out.events) == (1 * MS, 2 * MS, [1.0], 2)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_output_too(key: str) -> None:
    out = read(
        HEAD + chunk(delta(role="assistant")),
        chunk(delta(**{key: "hm"})),
        chunk(usage(3, 1)) + chunk(DONE) + LAST,
        chat=True,
    )
    assert (out.first, out.has_text) == (1 * MS, True)


def test_an_empty_text_in_a_completion_is_a_token() -> None:
    out = read(HEAD + chunk(token("")), chunk(token("é")), chunk(usage(1, 2)) + chunk(DONE) + LAST)
    assert (out.first, out.events, out.has_text) == (0, 2, True)


def test_an_output_without_any_text_is_seen() -> None:
    assert not read(stream(text="")).has_text


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((HEAD + chunk(event({"error": {"message": "out of memory"}})) + LAST,), "memory"),
        ((HEAD + chunk(event({"object": "error", "message": "bad luck"})) + LAST,), "bad luck"),
        ((HEAD + chunk(token()), LAST), "without [DONE]"),
        ((HEAD + chunk(DONE) + LAST,), "no token"),
        ((HEAD + chunk(b"data: {broken\n\n" + DONE) + LAST,), "unreadable"),
        ((HEAD + chunk(token() + b'event: error\n: "stream ended"\n\n') + LAST,), '"stream ended"'),
    ],
)  # fmt: skip
def test_errors_in_the_stream(pieces: tuple[bytes, ...], words: str) -> None:
    assert words in read(*pieces).error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"object":"error","message":"flat words","code":400}', "flat words"),
        (b'{"error":{"message":"nested words"}}', "nested words"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"success":false,"errors":[{"code":10000,"message":"not yours"}]}', "not yours"),
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
        (b"", "(empty body)"),
    ],
)  # fmt: skip
def test_the_words_of_an_error(body: bytes, words: str) -> None:
    head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert error_message(body) == words
    assert read(head + body).error == f"HTTP 502: {words}"


def test_an_error_that_a_proxy_compressed_has_its_status() -> None:
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n"
    assert read(head + b"\x1f\x8b").error.startswith("HTTP 401: the answer came as 'gzip'")


def test_a_document_that_is_no_object_holds_no_choices() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    assert read(head + b"[]").error == "the answer holds no choices: []"


def test_created_is_as_good_as_ok() -> None:
    assert read(stream().replace(b"200 OK", b"201 Created")).output_tokens == 3


def test_an_error_says_when_to_come_back() -> None:
    head = b"HTTP/1.1 429 Slow\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\n"
    assert read(head + b"wait").error == "HTTP 429: wait (Retry-After: 3)"


def test_an_answer_that_breaks_off_is_an_error() -> None:
    reply = Reply()
    assert not reply.add(stream()[:-40], 0, 0)
    assert "in the middle" in read_reply(reply, Outcome(0, 0, 0), False).error


def test_a_document_instead_of_a_stream() -> None:
    body = (
        b'{"model":"m","choices":[{"text":"hi"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    out = read(head % len(body), body)
    assert (out.streamed, out.output_tokens, out.first) == (False, 2, 1 * MS)


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/2 200\r\n\r\n"])
def test_what_is_not_http_is_refused(raw: bytes) -> None:
    with pytest.raises(Malformed):
        parse_head(raw)


def test_a_bad_chunk_size_is_refused() -> None:
    with pytest.raises(Malformed):
        Reply().add(HEAD + b"zz\r\nabc\r\n\r\n", 0, 0)


@pytest.mark.parametrize("length", [b"5, 5", b"-1", b"x"])
def test_a_length_that_is_no_number(length: bytes) -> None:
    with pytest.raises(Malformed, match="bad Content-Length"):
        parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n")


@pytest.mark.parametrize("ends", [(b"\n", b"\n"), (b"\r\n", b"\n"), (b"\n", b"\r\n")])
def test_a_header_may_have_bare_line_feeds(ends: tuple[bytes, bytes]) -> None:
    line, last = ends
    raw = b"HTTP/1.1 200 OK%sContent-Length: 2%s%s{}" % (line, line, last)
    for cut in range(1, len(raw)):
        reply = Reply()
        assert not reply.add(raw[:cut], 0, 0) and reply.add(raw[cut:], 0, 0)


def test_line_ends_before_an_answer_are_of_the_last_one() -> None:
    assert read(b"\r\n", b"\r\n" + stream()).output_tokens == 3


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        (b"\x15\x03\x01\x00\x02\x02\x16", "write https://"),
        (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "HTTP/2"),
        (b"SSH-2.0-OpenSSH\r\n", "not an HTTP response: b'SSH-2.0-OpenSSH\\r\\n'"),
    ],
)
def test_another_protocol_is_named(raw: bytes, hint: str) -> None:
    with pytest.raises(Malformed, match="not an HTTP response") as raised:
        parse_head(raw)
    assert hint in str(raised.value)


@pytest.mark.parametrize(
    ("host", "port", "tls", "said"),
    [
        ("llm.example", 80, False, "llm.example"),
        ("llm.example", 443, True, "llm.example"),
        ("llm.example", 443, False, "llm.example:443"),
        ("llm.example", 8000, False, "llm.example:8000"),
        ("::1", 80, False, "[::1]"),
        ("::1", 8000, True, "[::1]:8000"),
        ("müller.example", 80, False, "xn--mller-kva.example"),
    ],
)
def test_the_host_is_written_as_browsers_do(host: str, port: int, tls: bool, said: str) -> None:
    assert authority(host, port, tls) == said
    assert f"\r\nHost: {said}\r\n".encode() in Target(host, port, tls).request("/", b"")


@pytest.mark.parametrize(
    ("head", "close"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, close\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nConnection: Keep-Alive\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\nConnection: TE, Keep-Alive\r\n\r\n", False),
    ],
)
def test_whether_a_connection_is_kept(head: bytes, close: bool) -> None:
    found = parse_head(head)
    assert found and found.close is close


def texts(*found: str) -> list[bytes]:
    return [token(text) for text in found]


@pytest.mark.parametrize(
    ("events", "wanted", "first", "count"),
    [
        (texts("", "a", "b"), 2, 1, 2),  # the request was taken, and no more
        (texts("", "a", "b"), 3, 0, 3),  # the first half of a character
        (texts("", "", "a", "b"), 3, 1, 3),
        (texts("a", "", "b", ""), 4, 0, 4),  # a special token at the end
        (texts("a", "", "b", ""), 3, 0, 3),  # the end itself
        (texts("", "a", "b", ""), 3, 1, 3),
        (texts("a", "", "b"), 2, 0, 2),  # a heartbeat between them
        (texts("", "a b", "c d"), 4, 1, 2),  # several tokens an event
        (texts("", ""), 1, 0, 1),
        (texts("a", "b", ""), None, 0, 2),  # nobody counted
    ],
)
def test_which_events_are_tokens(
    events: list[bytes], wanted: int | None, first: int, count: int
) -> None:
    said = chunk(usage(1, wanted)) if wanted else b""
    out = read(HEAD, *map(chunk, events), said + chunk(DONE) + LAST)
    assert (out.first, out.events, out.output_tokens) == ((first + 1) * MS, count, wanted)


COUNTS = {"prompt_tokens": 4, "completion_tokens": 1}
LAST_WORD = {"index": 0, "text": " word", "finish_reason": "length"}
ELSEWHERE: dict[str, dict[str, object]] = {
    "a choice": {"choices": [{**LAST_WORD, "usage": COUNTS}]},
    "x_groq": {"choices": [LAST_WORD], "x_groq": {"usage": COUNTS}},
    "a choice, null at the top": {"choices": [{**LAST_WORD, "usage": COUNTS}], "usage": None},
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_usage_may_be_in(where: str) -> None:
    out = read(HEAD, chunk(event(ELSEWHERE[where])), chunk(DONE) + LAST)
    assert (out.error, out.prompt_tokens, out.output_tokens) == ("", 4, 1)


@pytest.mark.parametrize(
    "odd",
    [{"meta": {"usage": {}}}, {"choices": [{"a": {"usage": {}}}]}, {"x_groq": [{"usage": {}}]}],
)
def test_usage_anywhere_else_is_none(odd: dict[str, object]) -> None:
    out = read(HEAD, chunk(token()), chunk(event(odd)), chunk(DONE) + LAST)
    assert (out.error, out.prompt_tokens, out.output_tokens) == ("", None, None)


@pytest.mark.parametrize(
    ("total", "written"), [(135, 103), (41, 9), (0, 9), (None, 9), ("x", 9), (10, 9)]
)
def test_thoughts_are_output_though_the_total_alone_counts_them(total: Any, written: int) -> None:
    """xAI's own example: 32 + 9 + 94 = 135."""
    said = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": total}
    counts = event({"choices": [], "usage": said})
    out = read(HEAD + chunk(token()), chunk(counts) + chunk(DONE) + LAST)
    assert (out.prompt_tokens, out.output_tokens) == (32, written)


def test_a_heartbeat_may_have_words_before_a_token() -> None:
    beat = event({"message": "queued"})
    out = read(HEAD, *map(chunk, (beat, token(), usage(4, 1))), chunk(DONE) + LAST)
    assert (out.error, out.output_tokens, out.first) == ("", 1, 2 * MS)
    out = read(HEAD, *map(chunk, (token(), beat)), chunk(DONE) + LAST)
    assert out.error == "error from the server: queued"


def test_what_is_said_after_done_is_a_farewell_unless_it_is_an_error() -> None:
    said = [HEAD, *map(chunk, (token(finish="length"), usage(4, 1), DONE))]
    out = read(*said, chunk(b"event: close\n" + event({"message": "bye"})) + LAST)
    assert (out.error, out.output_tokens) == ("", 1)
    out = read(*said, chunk(event({"error": {"message": "too late"}})) + LAST)
    assert out.error == "error from the server: too late"


def test_a_heartbeat_that_looks_like_an_event_is_no_token() -> None:
    said, beat = (
        event({"choices": [{"delta": {"content": "a b"}}]}),
        event({"choices": [{"delta": {}}]}),
    )
    pieces = map(chunk, (said, beat, said, beat, said, usage(4, 6)))
    out = read(HEAD, *pieces, chunk(DONE) + LAST, chat=True)
    assert (out.error, out.events, list(out.gaps)) == ("", 3, [2.0, 2.0])


def test_half_a_character_that_is_left_out_is_a_token_if_the_count_says_so() -> None:
    word, half = (event({"choices": [{"delta": said}]}) for said in ({"content": "a"}, {}))
    end = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})  # a special token
    pieces = map(chunk, (word, half, word, end, usage(4, 4)))
    assert read(HEAD, *pieces, chunk(DONE) + LAST, chat=True).events == 4


def test_an_event_may_repeat_the_whole_message_so_far() -> None:
    """Perplexity's do; the last one adds nothing to it."""

    def said(delta: dict[str, str], text: str) -> bytes:
        return event({"choices": [{"delta": delta, "message": {"content": text}}]})

    pieces = (
        said({"content": "a"}, "a"),
        said({"content": "b"}, "ab"),
        said({}, "ab"),
        usage(4, 2),
    )
    out = read(HEAD, *map(chunk, pieces), chunk(DONE) + LAST, chat=True)
    assert (out.error, out.events) == ("", 2)


def test_a_finish_reason_may_be_more_than_a_word() -> None:
    assert read(HEAD, chunk(token(finish="max-tokens")), LAST).finish == "max-tokens"


def test_events_that_were_wrapped_twice() -> None:
    said = (token(), token(finish="stop"), usage(4, 2))
    out = read(HEAD, *(chunk(b"data: " + e) for e in said), chunk(b"data: " + DONE) + LAST)
    assert (out.error, out.output_tokens, out.events, out.finish) == ("", 2, 2, "stop")


def test_a_broken_answer_whose_error_had_come_has_its_words() -> None:
    reply, outcome = Reply(), Outcome(0, 0, 0)
    reply.add(b"HTTP/1.1 413 Too Large\r\nContent-Length: 99\r\n\r\ntoo long a prompt", 0, 0)
    outcome.error = "Connection reset by peer"
    assert read_reply(reply, outcome, False).error == "HTTP 413: too long a prompt"
