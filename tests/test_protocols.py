"""Every engine and every runtime that there is, held against its protocol."""

from __future__ import annotations

import inspect
from pkgutil import iter_modules
from typing import Any, get_origin, get_type_hints

import pytest

from launch import engines, runtimes
from launch.engines import Engine, engine, every, sglang, trtllm, vllm
from launch.runtimes import NAMES, Runtime, bare, docker, pyxis, runtime

# mypy holds these against the protocols, types and all.
ENGINES: dict[str, Engine] = {"sglang": sglang, "trtllm": trtllm, "vllm": vllm}
RUNTIMES: dict[str, Runtime] = {"bare": bare, "docker": docker, "pyxis": pyxis}


def is_of(value: object, kind: Any) -> bool:
    return isinstance(value, get_origin(kind) or kind)


def gaps(module: object, protocol: type) -> list[str]:
    """What a module lacks of a protocol, or has otherwise."""
    found = []
    for name, kind in get_type_hints(protocol).items():
        if not is_of(getattr(module, name, None), kind):
            found.append(f"{name}: {kind}")
    for name, method in inspect.getmembers(protocol, inspect.isfunction):
        if name.startswith("_"):
            continue
        wanted = [each for each in inspect.signature(method).parameters if each != "self"]
        function = getattr(module, name, None)
        if not function or list(inspect.signature(function).parameters) != wanted:
            found.append(f"{name}({', '.join(wanted)})")
    return found


def test_every_file_of_the_folders_is_one() -> None:
    assert sorted(ENGINES) == engines.NAMES
    assert every() == [trtllm, sglang, vllm]
    assert {module.name for module in iter_modules(runtimes.__path__)} == RUNTIMES.keys()
    assert sorted(RUNTIMES) == NAMES


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_all_that_the_launcher_asks_of_one(name: str) -> None:
    assert engine(name) is ENGINES[name]
    assert gaps(engine(name), Engine) == []


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_all_that_the_launcher_asks_of_one(name: str) -> None:
    assert runtime(name) is RUNTIMES[name]
    assert gaps(runtime(name), Runtime) == []


def test_a_name_that_is_missing_or_of_another_kind_is_a_gap() -> None:
    """So that the two tests above can fail."""
    assert "HAS_IMAGE: <class 'bool'>" in gaps(engines, Runtime)
    assert "container(plan, replica, node)" in gaps(engines, Runtime)
    assert "serve(plan, replica, environ)" in gaps(trtllm, Runtime)
