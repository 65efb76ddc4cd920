"""A single HTTP request to any kind of server, with limits on time and size.

Redirects are not followed: they would take the API key, and the measurement, elsewhere. Proxies are
not used: they cannot reach a private node, or would answer in its place. `requests` will not do:
its timeout is per read, so a server that sends a byte a second would hold us for ever.
"""

import json
import os
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from common.response import BROKEN_OFF, HEAD_LIMIT, Malformed, Reply, read_body

CONNECT_TIMEOUT = 5.0
LARGEST = 1 << 23  # bytes; 1,000 adapters take 1 MB to list, 1,000 iterations' statistics 2 MB
USER_AGENT = "tensorrt-llm-serve"  # gateways and their firewalls refuse requests without one
DEFAULT_PORTS = {False: 80, True: 443}  # by TLS
BUNDLE, CURLS = "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"  # Python itself reads only SSL_CERT_FILE


class Answer(NamedTuple):
    status: int
    body: bytes
    moved: str = ""  # where a redirect leads, in words
    server: str = ""  # the header of that name

    def json(self) -> Any:  # noqa: ANN401
        """The JSON document; ValueError if it is not JSON."""
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
    """The answer to a GET, or to a POST of `body`; without `whole`, only its status.

    The whole exchange must end within `seconds` (at most a day), connecting within CONNECT_TIMEOUT.
    OSError (including TimeoutError) if nobody answers, Malformed if the answer is not proper HTTP.
    """
    deadline, parts = time.monotonic() + seconds, urlsplit(url)
    tls = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or DEFAULT_PORTS[tls]
    with socket.create_connection((host, port), min(seconds, CONNECT_TIMEOUT)) as plain:
        sock = secured(plain, host, verify) if tls else plain
        with sock:
            sock.sendall(request(authority(host, port, tls), parts.path or "/", key, body))
            reply = receive(sock, deadline, whole)
    head = reply.head
    assert head
    return Answer(head.status, content(reply) if whole else b"", head.moved, head.server)


def content(reply: Reply) -> bytes:
    assert reply.head
    body = read_body(reply.raw, reply.head)
    if not body.whole:
        raise Malformed(BROKEN_OFF)
    return body.data


def authority(host: str, port: int, tls: bool) -> str:
    """The Host header as browsers write it: some gateways do not accept `name:80`."""
    name = f"[{host}]" if ":" in host else host.encode("idna").decode()
    return name if port == DEFAULT_PORTS[tls] else f"{name}:{port}"


def secured(sock: socket.socket, host: str, verify: bool) -> ssl.SSLSocket:
    return tls_context(verify).wrap_socket(sock, server_hostname=host)


def tls_context(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif name := next(filter(os.environ.get, (BUNDLE, CURLS)), ""):
        bundle = os.environ[name]
        try:
            context.load_verify_locations(
                **{"capath" if Path(bundle).is_dir() else "cafile": bundle}
            )
        except OSError as e:
            raise Malformed(f"{name}={bundle}: {e.strerror or e}") from None
    return context


def request(host: str, path: str, key: str, body: Mapping[str, object] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    kind = "Content-Type: application/json\r\n"
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n"
        f"Accept-Encoding: identity\r\nUser-Agent: {USER_AGENT}\r\n"
        + (f"Authorization: Bearer {key}\r\n" if key else "")
        + (f"{kind}Content-Length: {len(content)}\r\n" if content else "")
        + "Connection: close\r\n\r\n"
    )
    return head.encode() + content


def receive(sock: socket.socket, deadline: float, whole: bool) -> Reply:
    """Read until the answer (without `whole`: its header) is there, or until the deadline."""
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
