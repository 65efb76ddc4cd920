"""The candidates that a command line spans, and why others are left out."""

import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from common.settings import setting
from common.talk import Failure
from launch.arguments import value_of
from launch.engines import Engine

SIZES = ("tp", "pp", "ep")
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A configuration: its name, the engine's arguments, and how many GPUs it takes."""

    name: str  # of its row and its folder
    args: tuple[str, ...]  # for the engine, besides those that all have
    shape: str  # in the usual words: `TP 8, EP 8`
    gpus: int
    replicas: int = 1
    settings: str = ""  # everything the engine is given, including the contents of its file

    def words(self, common: Sequence[str], *options: str) -> list[str]:
        """The launcher's arguments: `common`, with `options` before its `--`, then the engine's.

        --replicas is always given, because the setting REPLICAS may say something else.
        """
        end = common.index("--") if "--" in common else len(common)
        options = (*options, "--replicas", str(self.replicas))
        return [*common[:end], *options, *common[end:], *self.args]


@dataclass(frozen=True)
class Space:
    """What the command line spans: each config and each mix of sizes, with each mix of the rest."""

    configs: tuple[str, ...] = ()
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # tp, pp, ep
    replicas: tuple[str, ...] = ()  # numbers, or auto
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of --set

    def combinations(self) -> Iterator[tuple[str, dict[str, int], str, dict[str, str]]]:
        """Config, sizes, replicas and settings of each; '' or {} for what is not varied."""
        configs: list[tuple[str, dict[str, int]]] = [(config, {}) for config in self.configs]
        sizes = [("", each) for each in mixed(self.sizes)] if self.sizes or not configs else []
        for (config, size), replicas, settings in itertools.product(
            [*configs, *sizes], self.replicas or ("",), mixed(self.settings)
        ):
            yield config, size, replicas, settings


def mixed(lists: Mapping[str, tuple[T, ...]]) -> list[dict[str, T]]:
    """Every way to take one of each list."""
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


@dataclass(frozen=True)
class LeftOut:
    name: str
    why: str


def expand(
    space: Space, engine: Engine, common: Sequence[str], model: Mapping[str, Any], gpus: int,
    folder: Path,
) -> tuple[list[Candidate], list[LeftOut]]:  # fmt: skip
    """All candidates that fit `gpus` GPUs (0: unknown), and why the others do not.

    `common` are the arguments that all have, `model` is the model's config.json. Settings that need
    a file get one in `folder`.
    """
    found: dict[str, Candidate] = {}
    left_out: list[LeftOut] = []
    names: set[str] = set()
    for config, sizes, replicas, settings in space.combinations():
        name = free(name_of(config, sizes, replicas, settings), names)
        names.add(name)
        try:
            args = engine.tuned(config, sizes, settings, folder / f"{name}.yaml")
            shape, world = engine.check([*common, *args])
            if setting("TP") and not value_of([*common, *args], *engine.TP):
                args += [engine.TP[0], str(world.tp)]  # else the launcher would add the setting's
            refuse_by_model(model, 1 if "attention DP" in shape else world.tp, world.pp)
            count = number_of(replicas, world.size, gpus)
            same = json.dumps([engine.effective([*common, *args]), count], sort_keys=True)
            if same in found:
                raise Failure(f"the same as {found[same].name}")
            found[same] = Candidate(name, tuple(args), shape, world.size * count, count, same)
        except Failure as failure:
            left_out.append(LeftOut(name, failure.message))
    return list(found.values()), left_out


def name_of(
    config: str, sizes: Mapping[str, int], replicas: str, settings: Mapping[str, str]
) -> str:
    """`tp8-ep8-max_batch_size64`"""
    words = [Path(config).stem] if config else []
    words += [f"{name}{size}" for name, size in sizes.items()]
    words += [f"x{replicas}"] if replicas else []
    words += [f"{key}{value}" for key, value in settings.items()]
    plain = "-".join(words) or "default"
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in plain)[:100]


def free(name: str, taken: Collection[str]) -> str:
    """The name, with a number if another candidate has it: `a/tp.yaml` and `b/tp.yaml`."""
    others = (f"{name}-{n}" for n in itertools.count(2))
    return next(each for each in itertools.chain([name], others) if each not in taken)


def number_of(replicas: str, world: int, gpus: int) -> int:
    """How many servers. Failure if they need more GPUs than there are."""
    if replicas == "auto":
        if not gpus:
            raise Failure("`auto` replicas need the number of GPUs: give --gpus")
        count = gpus // world
    else:
        count = int(replicas or 1)
    if gpus and (count < 1 or count * world > gpus):
        raise Failure(f"it needs {max(count, 1) * world} GPUs, and there are {gpus}")
    return count


def refuse_by_model(model: Mapping[str, Any], tp: int, pp: int) -> None:
    """Failure if the model's own numbers show that the engine cannot split it this way.

    `tp` is the number of parts of each layer's attention.
    """
    inner = model.get("text_config")
    text = inner if isinstance(inner, dict) else model
    heads, layers = text.get("num_attention_heads"), text.get("num_hidden_layers")
    if isinstance(heads, int) and heads % tp:
        raise Failure(f"the model's {heads} attention heads do not divide by TP {tp}")
    if isinstance(layers, int) and layers < pp:
        raise Failure(f"the model has {layers} layers, fewer than PP {pp}")


def model_config(model: str) -> dict[str, Any]:
    """The model's config.json, from its directory or from Hugging Face's cache on this machine.

    {} if it is in neither; then no candidate is left out because of it.
    """
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    for path in (Path(model) / "config.json", *sorted(snapshots.glob("*/config.json"))):
        try:
            found = json.loads(path.read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            continue
    return {}
