"""An engine's configuration file: YAML, of which a mapping of settings is expected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.talk import die
from launch.arguments import dashed, value_of


def read_config(path: str) -> dict[str, Any] | None:
    """The YAML; None where it is empty. Failure where it is anything but a mapping."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        die(f"cannot read the config file {path}: {error.strerror}")
    except RecursionError:
        die(f"the config file {path} is not YAML: nested too deeply")
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # a date that is none
        die(f"the config file {path} is not YAML: {' '.join(str(error).split())[:300]}")
    if not isinstance(config, dict | None):
        die(f"the config file {path} is not a mapping of settings")
    return config


def merged(args: Sequence[str]) -> list[str]:
    """The flags of --config FILE, then those of the command line, of which the last one wins.

    So do engines read it whose file holds nothing but flags.
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
