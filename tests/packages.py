"""Debian packages that tests need, and their installation where they are missing."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# slurm's pmix plug-in opens libpmix.so by that name, which only the -dev package has.
CLUSTER = (
    "slurmctld slurmd slurm-client munge libpmix2 libpmix-dev docker.io docker-registry "
    "mmdebstrap pigz zstd iproute2 procps util-linux gcc libc6-dev libslurm-dev squashfs-tools"
).split()
# A browser for the report, MPI for the simulator, a compiler for the benchmark's exact server.
OTHERS = (
    "chromium openmpi-bin python3-mpi4py gcc libc6-dev curl openssl pigz zstd squashfs-tools "
    "iproute2"
).split()
DPKG = Path("/var/lib/dpkg")
PATIENCE = 600.0  # seconds that another apt may take


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not installed; all of them on a system that is not Debian's."""
    if not shutil.which("dpkg-query"):
        return list(packages)
    query = ["dpkg-query", "--show", "--showformat=${Package} ${Status}\\n", *packages]
    shown = subprocess.run(query, text=True, capture_output=True).stdout
    installed = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def install(packages: Sequence[str]) -> None:
    """Install what is missing, without starting any service. RuntimeError with apt's words.

    One process of a test run does it, the others wait until it has; whatever else uses apt on this
    machine is waited for, too.
    """
    if not missing(packages):
        return
    with alone(), no_services():
        if wanted := missing(packages):  # still, after the wait
            apt_get("update", "-qq")
            apt_get("install", "-qq", "-y", "--no-install-recommends", *wanted)


@contextmanager
def alone() -> Iterator[None]:
    """No other process of ours is in here; the kernel drops the lock with us."""
    descriptor = os.open(DPKG, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def apt_get(*words: str) -> None:
    command = ["apt-get", "-o", f"DPkg::Lock::Timeout={PATIENCE:.0f}", *words]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    deadline = time.monotonic() + PATIENCE
    while (done := subprocess.run(command, env=env, text=True, capture_output=True)).returncode:
        # The option is for dpkg's lock. Those of the lists and of the archive are not waited for.
        if "Could not get lock" not in done.stderr or time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        time.sleep(1)


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
