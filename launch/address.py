"""Where a server can be reached, from where the launcher runs."""

import socket
from collections.abc import Sequence

from common.talk import die
from launch.arguments import value_of
from launch.findings import Node
from launch.nodes import Place


def url_of(head: Node, place: Place, serve_args: Sequence[str]) -> str:
    """Where the server will be: the address that was asked for, else the head node's IPv4."""
    host = value_of(serve_args, "--host") or ""
    port = value_of(serve_args, "--port")
    if host in ("0.0.0.0", "::"):
        host = address_of(head) if place.slurm else "127.0.0.1"
    elif place.slurm and is_loopback(host) and head.name != socket.gethostname().split(".")[0]:
        die(f"--host {host} cannot be reached from here: the server runs on {head.name}")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def address_of(head: Node) -> str:
    """The node's IPv4 address as its name resolves here; its own first address where that fails."""
    try:
        address = socket.gethostbyname(head.name)
    except OSError:
        address = "127."
    own = [each for each in head.facts.addresses if "." in each]
    return address if not address.startswith("127.") else (own or ["127.0.0.1"])[0]
