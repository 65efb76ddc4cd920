"""The ShareGPT conversations: found by path, downloaded if missing, picked by the usual rules.

The client has no tokenizer. So benchmark_serving's rules on what is too short or too long use
lengths estimated from bytes; the lengths that are reported come from the server.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import time
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.live import LiveLine
from common.talk import die, say
from load.payload import Conversations

URL = (
    "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered/resolve/main/"
    "ShareGPT_V3_unfiltered_cleaned_split.json"
)
BYTES_A_TOKEN = 4  # an English letter is a byte, a Chinese character is three
PIECE = 1 << 20
LONGEST = 64 << 20  # characters of one conversation; more is no conversation
LONGEST_WORD = 16  # characters of a JSON word or escape, which the end of a piece may cut
NEWLINE = "\n"
PACKED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "ZIP", b"PAR1": "Parquet"}
TAKEN = (
    "--sharegpt takes JSON or JSON Lines of conversations, messages, or a prompt and its completion"
)
BETWEEN = re.compile(r"[\s,\[\]\x1e]*")  # between entries; JSON Lines have no brackets or commas
TURNS = ("conversations", "conversation", "messages")
ASIDE = ("system", "developer", "tool")
USERS = ("user", "human", "prompter")
TEXTS = ("value", "content", "text")
QUESTIONS = ("prompt", "question")
ANSWERS = ("completion", "response", "answer", "output")


def provide(path: Path) -> None:
    """Before the first run: download the data set if it is missing, and read all of it.

    Failure if an entry is broken (it is named), or if nothing in it can be used.
    """
    if path.exists() and not path.is_file():  # a pipe, such as <(zcat FILE)
        die(f"{path} is not a file, which can be read again for each run", hint="name a file")
    if not path.exists():
        download(URL, path)
    pick(path, 1, 0)


def pick(path: Path, count: int, seed: int | str) -> Conversations:
    """`count` conversations picked at random, with the rules of benchmark_serving."""
    picked: list[tuple[str, int]] = []
    rng = random.Random(seed)
    for seen, turn in enumerate(usable_turns(path)):
        if len(picked) < count:
            picked.append(turn)
        elif (place := rng.randrange(seen + 1)) < count:
            picked[place] = turn
    if not picked:
        die(f"{path}: none of its {sum(1 for _ in entries(path)):,} entries is a conversation with "
            "a question and an answer of usual length (4 to 1,024 tokens)", hint=TAKEN)  # fmt: skip
    rng.shuffle(picked)
    return Conversations(tuple(picked))


def usable_turns(path: Path) -> Iterator[tuple[str, int]]:
    for entry in entries(path):
        prompt, answer = first_turns(entry)
        lengths = tokens(prompt), tokens(answer)
        if min(lengths) >= 4 and lengths[0] <= 1024 and sum(lengths) <= 2048:
            yield prompt, lengths[1]


def first_turns(entry: dict[str, Any]) -> tuple[str, str]:
    """A question and its answer, in the formats of ShareGPT, OpenAI and instruction sets."""
    found: list[Any] = next(
        (entry[name] for name in TURNS if isinstance(entry.get(name), list)), []
    )
    turns = [turn for turn in found if isinstance(turn, dict) and role(turn) not in ASIDE]
    # The assistant's greeting may come first; without known roles, the first turn asks.
    at = next((i for i, turn in enumerate(turns) if role(turn) in USERS), 0)
    asked = [words(turn, TEXTS) for turn in turns[at : at + 1]]
    said = [words(turn, TEXTS) for turn in turns[at + 1 :] if role(turn) not in USERS]
    prompt, answer = "".join(asked), next(filter(None, said), "")
    return prompt or question(entry), answer or words(entry, ANSWERS)


def role(turn: dict[str, Any]) -> str:
    return str(turn.get("from") or turn.get("role")).lower()


def question(entry: dict[str, Any]) -> str:
    """The question, with Alpaca's `input` or Dolly's `context` below it."""
    parts = [words(entry, (name,)) for name in ("instruction", "input", "context")]
    return words(entry, QUESTIONS) or "\n\n".join(filter(None, parts))


def words(holder: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first text under one of these names, without half surrogate pairs: none can be sent."""
    text = next((holder[name] for name in names if isinstance(holder.get(name), str | list)), "")
    if isinstance(text, list):  # of OpenAI's parts
        parts = [part.get("text") for part in text if isinstance(part, dict)]
        text = "".join(part for part in parts if isinstance(part, str))
    return text.encode(errors="replace").decode()


def tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_A_TOKEN)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array or of JSON Lines, one by one: the file may be larger than memory.

    Failure, with the number and line of the entry, if one is broken.
    """
    decode, text, number, line, found = json.JSONDecoder().raw_decode, "", 1, 1, False
    with path.open(encoding=encoding_of(path), errors="replace") as file:
        while piece := file.read(PIECE):
            text, at = text + piece, 0
            while (start := BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
                try:
                    value, end = decode(text, start)
                except (ValueError, RecursionError) as e:
                    if goes_on(e, text[start:]):
                        break  # the rest of it is in the next piece
                    if not found and text[start] != "{":
                        die(f"{path} is not JSON: {what_is(path)}", hint=TAKEN)
                    die(f"{path}: entry {number:,} (line {line + text.count(NEWLINE, 0, start):,}) "
                        f"is broken: {getattr(e, 'msg', e)}", hint="mend or remove it")  # fmt: skip
                if isinstance(value, dict):
                    found = True
                    yield value
                number, at = number + 1, end
            line += text.count(NEWLINE, 0, start)
            text = text[start:]
    if text:
        die(f"{path} is not whole: it ends in the middle of entry {number:,} (line {line:,})",
            hint="mend it; or remove it, and ShareGPT is downloaded there")  # fmt: skip


def encoding_of(path: Path) -> str:
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig"


def what_is(path: Path) -> str:
    """A file that is not JSON, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(60)
    packed = next((name for magic, name in PACKED.items() if head.startswith(magic)), "")
    line = head.decode(encoding_of(path), "replace").partition(NEWLINE)[0].strip()
    return f"it is a {packed} file" if packed else f"it begins with {line!r}"


def goes_on(error: Exception, text: str) -> bool:
    """Did decoding fail only because the text is incomplete so far?"""
    if not isinstance(error, json.JSONDecodeError) or len(text) > LONGEST:
        return False
    return error.msg.startswith("Unterminated") or error.pos + LONGEST_WORD > len(error.doc)


def download(url: str, path: Path) -> None:
    """Download to `.part`, continuing an earlier try; rename it once it is complete and correct."""
    import requests

    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    say(f"{path} is missing: downloading {url}" + (f" from byte {have:,}" if have else ""))
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
            if answer.status_code != 416:  # nothing is left to get
                answer.raise_for_status()
                keep(answer, part, have if answer.status_code == 206 else 0)
            digests = [h.headers.get("X-Linked-Etag", "") for h in answer.history]
    except requests.RequestException as e:
        die(f"{path} is missing, and {urlsplit(url).hostname} does not give it: {cause(e)}",
            hint="--sharegpt (SHAREGPT_PATH) names a copy; or leave sharegpt out of -t"
            )  # fmt: skip
    digest = next((d.strip('"') for d in digests if len(d) == 66), "")  # the host's own sha256
    if digest and sha256(part) != digest:
        part.unlink()
        die(f"{url}: the download is damaged", hint="run it again")
    part.replace(path)


def cause(error: Exception) -> str:
    """The error in plain words: the library's own are a page long."""
    import requests

    match error:
        case requests.HTTPError():
            return f"HTTP {error.response.status_code}"
        case requests.Timeout():
            return "it does not answer"
        case requests.exceptions.ProxyError():
            return "the proxy does not answer"
        case requests.exceptions.SSLError():
            return "its certificate is not trusted here"
        case requests.exceptions.ChunkedEncodingError():
            return "the connection broke off"
    return "no connection"


def keep(answer: Any, part: Path, have: int) -> None:  # noqa: ANN401
    total = have + int(answer.headers.get("Content-Length", 0))
    line, start = LiveLine(f"{part.stem}, MB", total >> 20), time.monotonic()
    with part.open("ab" if have else "wb") as file:
        for piece in answer.iter_content(PIECE):
            file.write(piece)
            line(file.tell() >> 20, 0, 0)
    line.clear()
    say(f"{total / 1e6:.0f} MB in {time.monotonic() - start:.0f} s")
    if total > have and part.stat().st_size != total:
        die(
            f"{part}: {part.stat().st_size:,} of {total:,} bytes came", hint="run it again to go on"
        )


def identity(path: Path) -> dict[str, str] | None:
    """What tells one data set from another; None if there is no file."""
    if not path.is_file():
        return None
    seen = path.stat()
    return {"file": path.name, "sha256": sha256_of(path, seen.st_size, seen.st_mtime_ns)}


@functools.cache
def sha256_of(path: Path, *_: int) -> str:
    """The sum of a large file, computed once for as long as the file stays the same."""
    return sha256(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
