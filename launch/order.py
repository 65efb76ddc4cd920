"""How an order reaches the nodes: a program and its order, down the pipe that the step holds.

A node needs `python3` and nothing of ours. What it tells comes back as JSON lines.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from launch.node import messages

PARTS = Path(__file__).parent / "node"
# A flag whose value is a secret, and its values, in the JSON of an order that is shown.
SECRET = re.compile(
    r'"(--(?:(?:admin[-_])?api[-_]key|hf[-_]token|ssl[-_]keyfile[-_]password))'
    r'(?:=(?:[^"\\]|\\.)*)?"(?:,\s*"(?!-)(?:[^"\\]|\\.)*")*'
)
TOO_OLD = 39  # the exit code of a Python older than 3.9
BOOT = (
    f"import sys; sys.version_info < (3, 9) and sys.exit({TOO_OLD}); "
    "exec(sys.stdin.buffer.read(int(sys.argv[1])))"
)
MESSAGES = {name: kind for name, kind in vars(messages).items() if isinstance(kind, type)}


@dataclass(frozen=True)
class Command:
    """An order for nodes: `prefix` says which (srun and its flags), [] means this machine."""

    prefix: Sequence[str]
    order: Any  # a dataclass of launch/node/

    @property
    def name(self) -> str:
        return type(self.order).__name__

    @property
    def argv(self) -> list[str]:
        """The command; its input is `text`, then whatever keeps the pipe open."""
        base, *others = parts_of(self.order)
        sizes = [str(size(base)), *(f"{part}:{size(part)}" for part in others)]
        python = "python3" if self.prefix else sys.executable
        return [*self.prefix, python, "-IS", "-c", BOOT, *sizes]

    @property
    def fields(self) -> dict[str, Any]:
        """What is sent of the order. Its `ends` are made on the node."""
        sent = [f.name for f in fields(self.order) if f.name != "ends"]
        return {self.name: {name: getattr(self.order, name) for name in sent}}

    @property
    def text(self) -> str:
        program = "".join(map(source, parts_of(self.order)))
        return f"{program}{json.dumps(self.fields)}\n\n"

    def shown(self, more: str = "") -> str:
        """The command for a shell, on readable lines; the commands in `more` feed what follows.

        Others may read it, so a secret is `***`.
        """
        files = folded(["cat", *(str(PARTS / f"{part}.py") for part in parts_of(self.order))])
        order = json.dumps(self.fields, indent=1, ensure_ascii=False)
        order = SECRET.sub(r'"\1=***"', order)
        feed = f"{{ {files}; cat <<'ORDER'; {more}}} | \\\n"
        return f"{feed}{folded(self.argv)}\n{order}\n\nORDER"


def folded(words: Sequence[str], width: int = 100) -> str:
    """A command, folded into lines that end with a backslash."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append(" ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


@cache
def source(part: str) -> str:
    return (PARTS / f"{part}.py").read_text(encoding="utf-8")


def size(part: str) -> int:
    return len(source(part).encode())


def parts_of(order: object) -> list[str]:
    """The files that an order needs, each after those that it imports."""
    return list(dict.fromkeys(needed(type(order).__module__.rpartition(".")[2])))


def needed(part: str) -> Iterator[str]:
    yield from ("base", "messages")
    for other in re.findall(r"^from launch\.node\.(\w+) import", source(part), re.M):
        if other not in ("base", "messages"):
            yield from needed(other)
    yield part


@dataclass(frozen=True)
class Told:
    """What a node told. Anything else that it printed is talk: `message` is None."""

    line: str
    node: str = ""
    message: Any = None


def read(lines: Iterable[str]) -> Iterator[Told]:
    """What nodes tell on these lines; messages that come in pieces are put together again."""
    begun: dict[str, str] = {}
    for told in map(parse, lines):
        if not isinstance(told.message, messages.Piece):
            yield told
            continue
        text = f"{begun.pop(told.node, '')}{told.message.text}"
        if told.message.last:
            yield parse(text)
        else:
            begun[told.node] = text


def parse(line: str) -> Told:
    line = line.rstrip("\n")
    try:
        found = json.loads(line)
        node = found.pop("node")
        [(name, values)] = found.items()
        return Told(line, str(node), MESSAGES[name](**values))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Told(line)
