"""The fault matrix; `make faults` plays all of it, the tests those cells that are marked for CI."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.faults import CELLS
from tests.cluster.scene import Cell, play


@pytest.mark.parametrize("cell", [c for c in CELLS if c.ci], ids=lambda cell: cell.name)
def test_what_the_user_sees_and_what_is_left(cell: Cell, cluster: Cluster) -> None:
    play(cell, cluster, slack=10)
