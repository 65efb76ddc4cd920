"""How trtllm-serve talks to the leader: a line of JSON each way, signed with the launch's key."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from console import Fatal

PROXY = "TLLM_SPAWN_PROXY_PROCESS"
ADDRESS = "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"
KEY = "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"
Message = dict[str, Any]


def is_proxied(env: Mapping[str, str]) -> bool:
    """Whether trtllm-llmapi-launch has started us, so that the ranks exist already."""
    return env.get(PROXY) == "1"


def _required(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise Fatal("AssertionError", f"{name} is not set.")
    return env[name]


def read_key(env: Mapping[str, str]) -> bytes:
    try:
        return bytes.fromhex(_required(env, KEY))
    except ValueError:
        raise Fatal("ValueError", f"{KEY} must be hexadecimal") from None


def seal(key: bytes, message: Message) -> bytes:
    text = json.dumps(message).encode()
    return _signature(key, text) + b" " + text + b"\n"


def unseal(key: bytes, line: bytes) -> Message:
    signature, _, text = line.rstrip(b"\n").partition(b" ")
    if signature != _signature(key, text):
        raise ValueError("HMAC verification failed")
    return dict(json.loads(text))


def _signature(key: bytes, text: bytes) -> bytes:
    import hmac  # late: it loads OpenSSL, and ranks sign nothing

    return hmac.new(key, text, "sha256").hexdigest().encode()


class Link:
    """The client's end. It waits for ever, as the real one's ZeroMQ does."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._key = read_key(env)
        host, _, port = _required(env, ADDRESS).removeprefix("tcp://").rpartition(":")
        if not host or not port.isdecimal():
            raise Fatal("ValueError", f"{ADDRESS} must be tcp://HOST:PORT")
        while True:  # nobody listens before all ranks are there
            with suppress(OSError):
                self._socket = socket.create_connection((host, int(port)))
                break
            time.sleep(0.1)
        self._lines = self._socket.makefile("rb")

    def join(self, world_size: int, gpus_per_node: int) -> None:
        """Have the leader compare its world with the one that we want; Fatal if they differ."""
        self.send({"op": "join", "world_size": world_size, "gpus_per_node": gpus_per_node})
        if "kind" in (answer := self.receive()):
            raise Fatal(answer["kind"], answer["error"])

    def on_broken(self, react: Callable[[], None]) -> None:
        """Have the leader keep watch; call `react` once when it speaks again, or has gone."""
        from asyncio import get_running_loop  # late: it is slow to import, and ranks do not need it

        self.send({"op": "watch"})
        loop = get_running_loop()

        def heard() -> None:
            loop.remove_reader(self._socket)
            react()

        loop.add_reader(self._socket, heard)

    def send(self, message: Message) -> None:
        with suppress(OSError):  # we notice that the leader has gone when we await its answer
            self._socket.sendall(seal(self._key, message))

    def receive(self) -> Message:
        """Return the leader's answer; in a broken world wait for ever, as the real one does."""
        with suppress(OSError):
            line = self._lines.readline()
            if line and "broken" not in (answer := unseal(self._key, line)):
                return answer
        while True:
            time.sleep(3600)
