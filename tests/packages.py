"""Debian packages that tests need, and their installation where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# slurm's pmix plug-in opens libpmix.so by that name, which only the -dev package has.
CLUSTER = (
    "slurmctld slurmd slurm-client munge libpmix2 libpmix-dev docker.io docker-registry "
    "debootstrap pigz zstd iproute2 procps util-linux gcc libc6-dev"
).split()
# A browser for the report, MPI for the simulator, a compiler for the benchmark's exact server.
OTHERS = "chromium openmpi-bin python3-mpi4py gcc libc6-dev curl openssl pigz zstd iproute2".split()


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not installed; all of them on a system that is not Debian's."""
    if not shutil.which("dpkg-query"):
        return list(packages)
    query = ["dpkg-query", "--show", "--showformat=${Package} ${Status}\\n", *packages]
    shown = subprocess.run(query, text=True, capture_output=True).stdout
    installed = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def install(packages: Sequence[str]) -> None:
    """Install what is missing, without starting any service. RuntimeError with apt's words."""
    if not (wanted := missing(packages)):
        return
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with no_services():
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted],
        ):
            done = subprocess.run(command, env=env, text=True, capture_output=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


@contextmanager
def no_services(policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """Debian asks this script before a package starts its service."""
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()
