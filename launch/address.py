"""Where a server can be reached from the machine of the launcher."""

from collections.abc import Sequence

from common.talk import die
from launch.arguments import value_of
from launch.findings import Node
from launch.node.containers import ANY
from launch.node.facts import network
from launch.nodes import Place


def url_of(head: Node, place: Place, serve_args: Sequence[str], *, colons: bool = True) -> str:
    """The server's URL: the address that was asked for, else one of the head node's.

    Without `colons`, a server on :: gets an IPv4 address, for programs that read `host:port`.
    """
    host = value_of(serve_args, "--host") or ""
    port = value_of(serve_args, "--port")
    if host in ANY:
        host = address_for(host, head, colons) if place.slurm else ANY[host]
    elif place.slurm and is_loopback(host) and head.facts.network != network():
        hint = "leave --host out, or run the launcher on the node itself (sbatch)"
        die(f"--host {host} cannot be reached from here: the server runs on {head.name}", hint=hint)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def address_for(host: str, head: Node, colons: bool) -> str:
    """An engine that listens on :: may take no IPv4; one that listens on 0.0.0.0 takes no IPv6."""
    of_6 = own_addresses(head, ":")
    if host == "::":
        return of_6[0] if of_6 and colons else address_of(head)
    if of_6 and not own_addresses(head, "."):
        what = f"{head.name} has no IPv4 address, and the server would listen on {host}"
        die(what, hint="add --host ::")
    return address_of(head)


def address_of(head: Node) -> str:
    """The node's IPv4 address as the node itself says; the one on the route to us comes first.

    What its name resolves to here may be on another network, or another machine.
    """
    return next(iter(own_addresses(head, ".")), head.name)


def own_addresses(head: Node, kind: str) -> list[str]:
    """The addresses by which others reach it: IPv4 (kind ".") or IPv6 (":")."""
    found = (each for each in head.facts.addresses if kind in each)
    return [each for each in found if not is_loopback(each) and not each.startswith("fe80:")]
