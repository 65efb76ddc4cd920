"""The engine's own libraries, without the parts that take as long to import and are never used."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def pydantic() -> ModuleType:
    """Else it asks all packages for plug-ins, and builds every model whether it is used or not:
    FastAPI has dozens that only /openapi.json needs."""
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    import pydantic

    pydantic.BaseModel.model_config["defer_build"] = True
    return pydantic


def bare(package: str, *below: str) -> None:
    """Without what its own __init__ imports, which is all that it has."""
    spec = find_spec(package)
    assert spec and spec.origin
    for name in (package, *(f"{package}.{each}" for each in below)):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(Path(spec.origin).parents[1].joinpath(*name.split(".")))]
