"""Runtimes: how a server's processes are contained on a node. A file each, with the same names.

Imports launch/plan.py, launch/image.py, launch/squash.py, launch/findings.py, launch/order.py and
the orders in launch/node/.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, cast

from launch.findings import Finding, Node, Wanted
from launch.image import Image
from launch.order import Command
from launch.plan import Plan, Replica

NAMES = sorted(module.name for module in iter_modules(__path__))


class Runtime(Protocol):
    """What the launcher asks of a runtime. For an order that it does not have, it returns None."""

    HAS_IMAGE: bool  # whether an image has to be on the nodes
    OVER_NODES: bool  # whether one server may lie over several nodes
    ATTENDED: bool  # whether a server on one node, too, has a step beside it, which `hold` starts

    def find_image(self, asked: str, workspace: Path) -> Image: ...
    def check(self, plan: Plan) -> None: ...  # Failure for what it cannot do
    def container(
        self, plan: Plan, replica: Replica, node: str
    ) -> str | None: ...  # its name, for people
    def serve(self, plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command: ...
    def hold(self, plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command: ...
    def ranks(self, plan: Plan, replica: Replica, log: Path) -> Command: ...
    def remove(self, plan: Plan, replica: Replica) -> Command | None: ...
    def ask_owner(self, plan: Plan, replica: Replica) -> Command: ...
    def blames(self, code: int, said: str) -> str: ...  # which part of it ended, not the engine
    def left(self, node: str, name: str, why: str) -> str: ...  # says that it may still be there
    def judge(self, node: Node, wanted: Wanted) -> Sequence[Finding]: ...


def runtime(name: str) -> Runtime:
    return cast(Runtime, import_module(f"{__name__}.{name}"))
