"""How tests wait: they look until a thing is true, and leave the cores to what they test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def comes_true(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether it does within so many seconds. What takes long to ask is asked less often."""
    deadline = (asked := time.monotonic()) + seconds
    while not condition():
        if (now := time.monotonic()) > deadline:
            return False
        time.sleep(max(0.02, min(0.3, 2 * (now - asked))))
        asked = time.monotonic()
    return True
