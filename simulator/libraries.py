"""The engine's own libraries, without parts that are slow to import and never used."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def pydantic() -> ModuleType:
    """Import pydantic without its search for plug-ins, and without building unused models."""
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    import pydantic

    pydantic.BaseModel.model_config["defer_build"] = True
    return pydantic


def bare(package: str, *below: str) -> None:
    """Provide a package without running its __init__, which does nothing but import."""
    spec = find_spec(package)
    assert spec and spec.origin
    for name in (package, *(f"{package}.{each}" for each in below)):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(Path(spec.origin).parents[1].joinpath(*name.split(".")))]


class Unused(ModuleType):
    """Has every name; behind each is a class that takes anything."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda *_, **__: None})
        setattr(self, name, made)
        return made


def fastapi() -> None:
    """Prepare FastAPI: no pydantic 1, and no models of /openapi.json, which is not checked here."""
    pydantic()
    for name in ("_compat.v1", "temp_pydantic_v1_params", "openapi.models"):
        sys.modules[f"fastapi.{name}"] = Unused(name)
    vars(sys.modules["fastapi.openapi.models"])["OpenAPI"] = dict
    vars(sys.modules["fastapi._compat.v1"])["get_definitions"] = lambda **_: ({}, {})
