"""One question to a server that may be anything: bounded in time and in size, and by the book.

No redirect is followed: it would take the key, and what is measured, elsewhere. No proxy is used:
it cannot reach a private node, or would answer in its stead. The library that scripts use for the
rest has a timeout for each read, so that a byte a second would hold it for ever.
"""

import json
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from common.response import HEAD_LIMIT, Malformed, Reply, read_body

CONNECT_TIMEOUT = 5.0
LARGEST = 1 << 20  # bytes; no honest answer to these questions comes near


class Answer(NamedTuple):
    status: int
    body: bytes

    def json(self) -> Any:  # noqa: ANN401
        """The document; ValueError where it is none."""
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def ask(
    url: str,
    seconds: float,
    *,
    body: Mapping[str, object] | None = None,
    key: str = "",
    verify: bool = True,
    whole: bool = True,
) -> Answer:
    """The answer to a GET, or to a POST of `body`; without `whole`, its status alone.

    Everything has to be over in `seconds`, at most a day; a connection within CONNECT_TIMEOUT.
    OSError (TimeoutError, too) where nobody answers, Malformed where it is no good answer.
    """
    deadline, parts = time.monotonic() + seconds, urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), min(seconds, CONNECT_TIMEOUT)) as plain:
        tls = tls_context(verify) if parts.scheme == "https" else None
        with tls.wrap_socket(plain, server_hostname=parts.hostname) if tls else plain as sock:
            sock.sendall(request(parts.netloc, parts.path or "/", key, body))
            reply = receive(sock, deadline, whole)
    assert reply.head
    return Answer(reply.head.status, read_body(reply.raw, reply.head).data if whole else b"")


def tls_context(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def request(host: str, path: str, key: str, body: Mapping[str, object] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    kind = "Content-Type: application/json\r\n"
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n"
        + (f"Authorization: Bearer {key}\r\n" if key else "")
        + (f"{kind}Content-Length: {len(content)}\r\n" if content else "")
        + "Connection: close\r\n\r\n"
    )
    return head.encode() + content


def receive(sock: socket.socket, deadline: float, whole: bool) -> Reply:
    """What comes until the answer is whole, or its header is; a deadline for all of it."""
    reply = Reply()
    while True:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        data = sock.recv(1 << 16)
        ended = not data or reply.add(data, 0, 0)
        if reply.head and (ended or not whole):
            return reply
        if ended:
            raise Malformed("the connection was closed without an answer")
        if len(reply.raw) > HEAD_LIMIT + LARGEST:
            raise Malformed(f"the answer does not end: {len(reply.raw):,} bytes so far")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
