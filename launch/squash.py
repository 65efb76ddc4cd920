"""The image that pyxis unpacks: a squashfs file (.sqsh), one for all nodes."""

import re
from dataclasses import replace
from pathlib import Path

from common.talk import die
from launch.image import REFERENCE, Image, read_sidecar, registry_of

SUFFIXES = (".sqsh", ".squashfs")
HUB = "docker.io"  # its registry has another name, which enroot knows as its default
DEFAULT = "tensorrt-llm-serve-latest.sqsh"
GET_ONE = "write one with `make sqsh`, or name an image of a registry, which is imported once"


def is_squash(asked: str) -> bool:
    return asked.endswith(SUFFIXES)


def find_image(asked: str, workspace: Path) -> Image:
    """The image that --image names: a .sqsh file, or a reference whose import is kept here."""
    if not asked and not (workspace / DEFAULT).is_file():
        die(f"there is no {DEFAULT} in {workspace}, and no --image is given", hint=GET_ONE)
    if not asked or is_squash(asked):
        return read_squash(Path(asked) if asked else workspace / DEFAULT)
    reference = asked.removeprefix("docker://")
    named = reference.replace("#", "/", 1)
    if not REFERENCE.fullmatch(named) or "/" not in named or reference[0] in "/.~":
        die(f"{asked[:99]!r} is neither a .sqsh file nor an image of a registry", hint=GET_ONE)
    path = workspace / (re.sub(r"[^\w.-]+", "-", reference) + ".sqsh")
    registry = reference.partition("#")[0] if "#" in reference else registry_of(reference)
    name = named.removeprefix(f"{registry}/")
    # Every version of enroot reads the form with #.
    where = "" if registry in ("", HUB) else f"{registry}#"
    return replace(as_image(path), reference=f"docker://{where}{name}")


def read_squash(path: Path) -> Image:
    try:
        path = path.expanduser().resolve()
        if not path.is_file():
            die(f"the image {path} does not exist", hint=GET_ONE)
    except (OSError, RuntimeError) as error:
        die(f"cannot read the image {path}: {error}")
    return as_image(path)


def as_image(path: Path) -> Image:
    """The image, with what its sidecar says; it is known by its path alone."""
    size = path.stat().st_size if path.is_file() else 0
    known = (read_sidecar(path, "sqsh", size) if size else None) or Image("")
    name = {"tag": str(path), "tarball": path, "ids": (), "layers": "", "squash": True}
    return replace(known, packed=size, **name)  # type: ignore[arg-type]
