"""The port that the last server's connections hold, on a node."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from launch.node.messages import Lingers
from launch.node.port import AwaitPort
from launch.order import Command
from tests.conftest import Script

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_a_port_is_awaited_that_nobody_listens_on(script: Callable[..., Script]) -> None:
    """As a server's last connections hold it: it is bound, and answers nobody."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        order = Command([], AwaitPort(held.getsockname()[1]))
        waiting = script(order)
        waiting.until(lambda: waiting.told == [Lingers()])
        assert waiting.process.poll() is None
    assert waiting.code() == 0
    assert waiting.told == [Lingers()]


def test_a_port_on_which_somebody_listens_is_not_awaited(script: Callable[..., Script]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        waiting = script(Command([], AwaitPort(server.getsockname()[1])))
        assert (waiting.code(), waiting.told) == (0, [])


def test_who_awaits_a_port_ends_with_the_launcher(script: Callable[..., Script]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        waiting = script(Command([], AwaitPort(held.getsockname()[1])))
        waiting.until(lambda: waiting.told)
        waiting.close()
        assert waiting.code() == 143
