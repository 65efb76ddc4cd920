"""Data sets as people have them: what is read of them, and what is said of a broken one."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure
from load import sharegpt
from load.clients import Builtin, Options, repeats
from load.endpoint import Endpoint
from load.matrix import Case
from load.payload import Conversations
from tests.loopback import MODEL, serving
from tests.servers import Kind, bench, running

pytestmark = pytest.mark.usefixtures("clean_environment", "same_signals", "any_machine")
ANSWER = "it is fine, and it stays fine for the rest of the week"
DATA = Path("data.json")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(
    clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)


def question(number: int) -> str:
    return f"question {number}: what is the weather like today, please?"


def turns(number: int, name: str = "conversations", who: str = "from", text: str = "value") -> Any:
    return {name: [{who: "human", text: question(number)}, {who: "gpt", text: ANSWER}]}


def picked(data: bytes, count: int = 9) -> list[str]:
    DATA.write_bytes(data)
    return sorted(str(prompt) for prompt, _ in sharegpt.pick(DATA, count, 0).turns)


ENTRIES: dict[str, Callable[[int], Any]] = {
    "ShareGPT": turns,
    "OpenAI's messages": lambda n: turns(n, "messages", "role", "content"),
    "with a system prompt": lambda n: {
        "messages": [{"role": "system", "content": "be kind " * 9},
                     *turns(n, "messages", "role", "content")["messages"]]
    },
    "instructions": lambda n: {"instruction": question(n), "input": "", "output": ANSWER},
    "prompts and completions": lambda n: {"prompt": question(n), "completion": ANSWER},
}  # fmt: skip


def messages(*said: tuple[str, Any]) -> Any:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


ASKS = "What is the weather like?"
IN_PARTS = [{"type": "text", "text": ASKS[:9]}, {"type": "image_url"}, {"text": ASKS[9:]}]
ODD: dict[str, Any] = {
    "a developer's word": messages(("developer", "be kind"), ("user", ASKS), ("assistant", ANSWER)),
    "roles in capitals": messages(("System", "be kind"), ("USER", ASKS), ("Assistant", ANSWER)),
    "a greeting": messages(("assistant", "Hello!"), ("user", ASKS), ("assistant", ANSWER)),
    "two questions": messages(("user", ASKS), ("user", "well?"), ("assistant", ANSWER)),
    "a tool": messages(("user", ASKS), ("assistant", None), ("tool", "{}"), ("assistant", ANSWER)),
    "parts": messages(("user", IN_PARTS), ("assistant", [{"type": "text", "text": ANSWER}])),
    "no roles": {"conversations": [{"value": ASKS}, {"value": ANSWER}]},
    "other roles": {
        "conversations": [{"from": "ann", "value": ASKS}, {"from": "bob", "value": ANSWER}]
    },
}  # fmt: skip


@pytest.mark.parametrize("entry", ODD.values(), ids=ODD)
def test_the_question_of_a_conversation_with(entry: Any) -> None:
    assert sharegpt.first_turns(entry) == (ASKS, ANSWER)


@pytest.mark.parametrize("name", ["input", "context"])
def test_an_instruction_comes_with_what_it_is_about(name: str) -> None:
    entry = {"instruction": "Translate this.", name: "Good morning.", "output": ANSWER}
    assert sharegpt.first_turns(entry) == ("Translate this.\n\nGood morning.", ANSWER)


@pytest.mark.parametrize("more", [1, 16])
def test_the_warm_up_asks_nothing_that_is_measured(more: int) -> None:
    DATA.write_text(json.dumps([turns(n) for n in range(8 + more)]))
    client = Builtin(Endpoint("http://h:1", MODEL, MODEL), Options(DATA))
    load = client.load_for(Case("sharegpt", None, None, 8, 4), 1)
    warm_up = client.warm_up_load(load, 4)
    bodies = [json.loads(warm_up.body(i)) for i in range(4)]
    assert not {b["prompt"] for b in bodies} & {
        json.loads(load.body(i))["prompt"] for i in range(8)
    }
    assert all(body["max_tokens"] <= 32 for body in bodies)


@pytest.mark.parametrize(("there", "warmed", "said"), [(9, 4, ""), (8, 0, ""), (8, 4, "to spare"),
                                                       (7, 4, "only 7")])  # fmt: skip
def test_what_a_prefix_cache_knows_is_said(there: int, warmed: int, said: str) -> None:
    found = repeats(Conversations((("hello", 8),) * there), 8, warmed)
    assert bool(found) == bool(said) and said in "".join(found)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_the_usual_forms_of_an_entry(entry: Callable[[int], Any]) -> None:
    assert picked(json.dumps([entry(n) for n in range(3)]).encode()) == [
        question(n) for n in range(3)
    ]


LINES = "\n".join(json.dumps(turns(n)) for n in range(3))
FILES = {
    "an array": json.dumps([turns(n) for n in range(3)]).encode(),
    "an array, indented": json.dumps([turns(n) for n in range(3)], indent=4).encode(),
    "JSON Lines": LINES.encode(),
    "JSON Lines, one of them empty": LINES.replace("\n", "\r\n\r\n").encode() + b"\n\n",
    "with a byte order mark": b"\xef\xbb\xbf" + LINES.encode(),
    "as PowerShell writes it": LINES.encode("utf-16"),
    "among others": b'[1, "two", null, ' + LINES.replace("\n", ",[],").encode() + b"]",
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_the_usual_forms_of_a_file(
    data: bytes, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharegpt, "PIECE", piece)
    assert picked(data) == [question(n) for n in range(3)]


def cut(number: int) -> str:
    entries = [json.dumps(turns(n)) for n in range(5)]
    entries[number] = entries[number][:60]
    return ",\n".join(entries)


BROKEN = {
    "a string that does not end": (f"[{cut(2)}]", r"entry 3 \(line 3\) is broken: Invalid control"),
    "a line that does not end": (cut(1).replace(",\n", "\n"), r"entry 2 \(line 2\) is broken"),
    "a word of Python": (
        FILES["an array"].decode().replace('"gpt"', "None", 1),
        "entry 1 .*Expect",
    ),
    "a file that does not end": (LINES[:-9], r"is not whole: it ends in the middle of entry 3 \("),
    "a table": ("question,answer\nwhat?,that!\n" * 9, "not JSON: it begins with 'question,answer'"),
    "a quoted table": ('"a","b"\n0,that\n' * 9, 'not JSON: it begins with \'"a","b"\''),
    "nothing of use": ('[{"text": "one"}, {"text": "two"}]', "none of its 2 entries is a conver"),
    "nothing at all": ("", "none of its 0 entries"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("piece", [50, 1 << 20])
def test_where_a_file_is_broken(
    text: str, words: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharegpt, "PIECE", piece)
    with pytest.raises(Failure, match=words):
        picked(text.encode())


PACKED = {
    "gzip": gzip.compress(LINES.encode()),
    "Parquet": b"PAR1" + bytes(range(256)),
    "zstd": b"(\xb5/\xfd" + bytes(range(256)),
    "ZIP": b"PK\x03\x04" + bytes(range(256)),
}


@pytest.mark.parametrize("kind", PACKED)
def test_what_else_a_file_is(kind: str) -> None:
    with pytest.raises(Failure, match=f"data.json is not JSON: it is a {kind} file") as failed:
        picked(PACKED[kind])
    assert "takes JSON or JSON Lines of conversations" in failed.value.hint


def test_half_a_surrogate_pair_is_sent_as_a_text_that_every_server_can_read() -> None:
    entry = turns(1)
    entry["conversations"][0]["value"] += "\ud83d" * 4 + "\U0001f600"
    (prompt,) = picked(json.dumps([entry]).encode())
    assert prompt.encode().decode() == question(1) + "????\U0001f600"


def test_a_chinese_sentence_is_not_too_short() -> None:
    """A character of it is most of a token, and not a quarter of one."""
    question, answer = "今天天气怎么样呢", "今天天气很好。"
    entry = {"messages": [{"role": "user", "content": question}, {"content": answer}]}
    assert picked(json.dumps([entry]).encode()) == [question]


def test_a_pipe_cannot_be_read_again() -> None:
    """As in --sharegpt <(zcat FILE)."""
    os.mkfifo(DATA)
    with pytest.raises(Failure, match="is not a file, which can be read again"):
        sharegpt.provide(DATA)


def test_a_broken_data_set_is_found_before_the_first_run() -> None:
    DATA.write_text("[" + cut(2))
    with running(Kind()) as server:
        said = bench(server, "-t", "latency,sharegpt", "--sharegpt", str(DATA))
    assert said.code == 1
    assert "entry 3" in said.err
    assert not [r for r in server.requests if r.body]
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/x", "127.0.0.1 does not give it: no connection"),
        ("http://no.such.invalid/x", "no.such.invalid does not give it: no connection"),
    ],
)
def test_a_data_set_that_cannot_be_downloaded_is_told_first(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharegpt, "URL", url)
    with running(Kind()) as server:
        said = bench(server, "-t", "latency,sharegpt")
    assert said.code == 1
    assert f"ShareGPT.json is missing, and {words}" in said.err
    assert "or leave sharegpt out of -t" in said.err
    assert "Pool" not in said.err
    assert not [r for r in server.requests if r.body]


def test_what_the_other_side_answers_is_told_in_its_number() -> None:
    with (
        serving(lambda request: request.document({}, "403 Forbidden")) as server,
        pytest.raises(Failure, match="does not give it: HTTP 403"),
    ):
        sharegpt.download(f"http://127.0.0.1:{server.port}/x", DATA)
