"""The ShareGPT conversations: found by path, downloaded when missing, picked by the usual rules.

The client has no tokenizer. The rules of benchmark_serving (which conversations are too short or
too long) are applied to lengths estimated from characters; what is reported comes from the server.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.live import LiveLine
from common.talk import die, say
from load.payload import Conversations

URL = (
    "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered/resolve/main/"
    "ShareGPT_V3_unfiltered_cleaned_split.json"
)
CHARACTERS_A_TOKEN = 4
PIECE = 1 << 20
LONGEST = 64 << 20  # characters of one conversation; more is no conversation


def pick(path: Path, count: int, seed: int | str) -> Conversations:
    """`count` conversations picked at random, with the rules of benchmark_serving."""
    if not path.exists():
        download(URL, path)
    picked: list[tuple[str, int]] = []
    rng = random.Random(seed)
    for seen, turn in enumerate(usable_turns(path)):
        if len(picked) < count:
            picked.append(turn)
        elif (place := rng.randrange(seen + 1)) < count:
            picked[place] = turn
    if not picked:
        die(f"{path}: no usable conversation in it", hint="remove it, it is downloaded again")
    rng.shuffle(picked)
    return Conversations(tuple(picked))


def usable_turns(path: Path) -> Iterator[tuple[str, int]]:
    for conversation in read_array(path):
        found = conversation.get("conversations") or conversation.get("conversation")
        turns = [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []
        if len(turns) < 2:
            continue
        prompt, answer = (str(t.get("value") or t.get("content") or "") for t in turns[:2])
        lengths = tokens(prompt), tokens(answer)
        if min(lengths) >= 4 and lengths[0] <= 1024 and sum(lengths) <= 2048:
            yield prompt, lengths[1]


def tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_A_TOKEN)


def read_array(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a long JSON array, one by one: the file is larger than a client's memory."""
    decode, text = json.JSONDecoder().raw_decode, ""
    with path.open(encoding="utf-8", errors="replace") as file:
        file.read(1)  # [
        while piece := file.read(PIECE):
            text += piece
            at = 0
            while (at := text.find("{", at)) >= 0:
                try:
                    value, at = decode(text, at)
                except (ValueError, RecursionError):
                    break  # the rest of it is in the next piece
                yield value
            text = text[at:] if at >= 0 else ""
            if len(text) > LONGEST:
                break
    if text.strip(" \r\n\t],"):
        die(f"{path} is not whole", hint="remove it, it is downloaded again")


def download(url: str, path: Path) -> None:
    """Into `.part`, going on where an earlier try stopped; renamed when it is whole and right."""
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
        die(f"cannot download {url} (SHAREGPT_PATH names a local copy): {e}")
    digest = next((d.strip('"') for d in digests if len(d) == 66), "")  # the host's own sha256
    if digest and sha256(part) != digest:
        part.unlink()
        die(f"{url}: what came is damaged", hint="run it again")
    part.replace(path)


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
    """What tells one data set from another; None where there is no file."""
    if not path.is_file():
        return None
    seen = path.stat()
    return {"file": path.name, "sha256": sha256_of(path, seen.st_size, seen.st_mtime_ns)}


@functools.cache
def sha256_of(path: Path, *_: int) -> str:
    """Of a file that is large, once for as long as it stays the same."""
    return sha256(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
