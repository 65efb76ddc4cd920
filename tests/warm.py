"""Fake programs that answer at once: a Python that has imported everything is forked for each call.

Starting one takes 20 ms, and the scripts ask Docker and Slurm thousands of times in a test run.
The program itself is a few lines of bash, which hand over the arguments and print the answer.
"""

from __future__ import annotations

import contextlib  # noqa: F401 (this one and those below: for the programs)
import fcntl  # noqa: F401
import io
import json  # noqa: F401
import marshal
import os
import re  # noqa: F401
import select
import signal
import socket
import subprocess
import sys
import time  # noqa: F401
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Told: how many words follow; the variables that these programs look at; the path; the arguments.
# Heard: the exit code, then lines that begin with the descriptor that they are for.
CLIENT = r"""#!/bin/bash
[[ $1 =~ ^({not_at_once})$ && $1 ]] && exec {python} -SE -c '{start}' {code} "$@"
names=(${{!FAKE_@}} ${{!SLURM@}} ${{!SQUEUE_@}})
exec 3<>/dev/tcp/127.0.0.1/{port} || exit 70
{{
  printf '%s\0' $((${{#names[@]}} + 2 + $#))
  for name in "${{names[@]}}"; do printf '%s=%s\0' "$name" "${{!name}}"; done
  printf '%s\0' '' {code} "$@"
}} >&3
read -r code <&3
while IFS= read -r line <&3; do printf '%s\n' "${{line:1}}" >&"${{line:0:1}}"; done
exit "$code"
"""

# The path, not -c, is what the program is called by.
START = 'import marshal, sys; del sys.argv[0]; exec(marshal.loads(open(sys.argv[0], "rb").read()))'


def client(path: Path, not_at_once: str, code: bytes) -> str:
    """The text of a program. `path` is for its code, which runs by itself where the first argument
    is `not_at_once` (a pattern of bash): what takes an input, or lasts."""
    path.write_bytes(code)
    return CLIENT.format(
        not_at_once=not_at_once, python=sys.executable, start=START, code=path, port=port()
    )


@cache
def port() -> int:
    """Where this process has its server, which ends when our end of its input is closed."""
    (theirs, ours), command = os.pipe(), [sys.executable, "-SE", __file__]
    server = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    server.returncode = 0  # nobody waits for it, and `ours` stays open as long as we live
    assert server.stdout and os.fstat(ours)
    with server.stdout as told:
        return int(told.readline())


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection = listener.accept()[0]
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.sendall(answer(words(connection)).encode())
            os._exit(0)
        connection.close()


def words(connection: socket.socket) -> Iterator[str]:
    with connection.makefile("rb") as stream:
        data = b""
        while b"\0" not in data or data.count(b"\0") <= int(data.partition(b"\0")[0]):
            data += stream.read1()
    yield from data.decode(errors="surrogateescape").split("\0")[1:-1]


def answer(told: Iterator[str]) -> str:
    os.environ.clear()
    while variable := next(told):
        name, _, os.environ[name] = variable.partition("=")
    sys.argv = [*told]
    sys.stdout, sys.stderr = out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        exec(marshal.loads(Path(sys.argv[0]).read_bytes()), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = traceback.format_exc()
    if not isinstance(code, int):
        print(code, file=err)
        code = 1
    lines = [f"1{line}\n" for line in out.getvalue().splitlines()]
    return f"{code}\n" + "".join(lines + [f"2{line}\n" for line in err.getvalue().splitlines()])


if __name__ == "__main__":
    main()
