"""A squashfs file: whether it can be an image, and which engine is in it. Nothing is unpacked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from launch.node.base import ask

ADMINS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{ADMINS}")


def why_not(path: str) -> str:
    """Why a file cannot be an image; '' if it can."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return "" if start == b"hsqs" else f"{path} is not a squashfs file"


def checked(path: str) -> str:
    """What unsquashfs finds wrong with a file; '' if nothing."""
    code, said = ask(which("unsquashfs") or "unsquashfs", "-s", path)
    return said if code else ""


def release_in(path: str, packages: list[str]) -> str:
    """Engine and version, by the names of packages in the file; '' if nobody can tell."""
    if not (unsquashfs := which("unsquashfs")):
        return ""
    pattern = rf"/({'|'.join(packages)})-(\d[\w.+!]*)\.dist-info$"
    said = ask(unsquashfs, "-l", path, timeout=60, stderr=subprocess.DEVNULL)[1]
    found = dict(re.findall(pattern, said, re.M))
    return next((f"{name} {found[name]}" for name in packages if name in found), "")
