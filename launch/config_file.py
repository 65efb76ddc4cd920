"""YAML files: an engine's configuration (a mapping of settings), and the tables of engines/."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.talk import die
from launch.arguments import dashed, value_of

ENGINES = Path(__file__).parent / "engines"


def read_table(name: str) -> dict[str, Any]:
    """A table of engines/, by PyYAML's loader in C if it has one, which is ten times as fast."""
    import yaml  # late: a start may need none

    text = (ENGINES / name).read_text(encoding="utf-8")
    return dict(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def read_config(path: str) -> dict[str, Any] | None:
    """The file's settings; None if it is empty. Failure if it is anything but a mapping."""
    import yaml

    try:
        with refusing(f"the config file {path}"):
            config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        die(f"cannot read the config file {path}: {error.strerror}")
    if not isinstance(config, dict | None):
        die(f"the config file {path} is not a mapping of settings")
    return config


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what is wrong with YAML into a Failure."""
    import yaml

    try:
        yield
    except RecursionError:
        die(f"{what} is not YAML: nested too deeply")
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # such as a date that does not exist
        die(f"{what} is not YAML: {' '.join(str(error).split())[:300]}")


def merged(args: Sequence[str]) -> list[str]:
    """The flags of --config FILE, then those of the command line, which win as they come last.

    Engines whose file holds nothing but flags read it like this.
    """
    words = dashed(args)
    path = value_of(words, "--config")
    config = (read_config(path) or {}) if path is not None else {}
    flags = [word for key, value in config.items() for word in flag_of(str(key), value)]
    return [*dashed(flags), *words]


def flag_of(key: str, value: Any) -> list[str]:  # noqa: ANN401 (whatever YAML has)
    if value is None or isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}={value}"]


def write_with(path: str, settings: Mapping[str, str], file: Path) -> None:
    """Write the YAML at `path` ('': an empty one) with these settings to `file`; values are YAML.

    `a.b` is the key b of the mapping a.
    """
    import yaml

    config = (read_config(path) or {}) if path else {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        inner = config
        for name in outer:
            if not isinstance(inner.setdefault(name, {}), dict):
                die(f"{key}: {name} is not a mapping in {path}")
            inner = inner[name]
        with refusing(f"{key}={value}"):
            inner[last] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(config))
