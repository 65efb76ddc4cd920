#!/usr/bin/env python3
"""What an image has: engine, MPI, NCCL, EFA, GDRCopy. Runs inside it; standard
library only.

Exit code 1 when something is missing that serving needs; what only EFA or
several nodes need is reported as absent. `make image-check IMAGE=...` runs it
in a container.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = (  # where the Dockerfile and NVIDIA's images keep what ldconfig may not know
    "/opt/amazon/efa/lib /opt/amazon/ofi-nccl/lib /opt/amazon/ofi-nccl/lib/x86_64-linux-gnu "
    "/opt/amazon/ofi-nccl/lib/aarch64-linux-gnu /opt/gdrcopy/lib /usr/local/lib"
).split()


@dataclass(frozen=True)
class Check:
    """Something to look for: a program's own words, or a library."""

    name: str
    command: tuple[str, ...] = ()
    pattern: str = r"(.+)"  # its first group is what is shown
    library: str = ""
    required: bool = False


def says(code: str) -> tuple[str, ...]:
    return ("python3", "-c", code)


CHECKS = (
    # Nothing of the engine is imported: without a GPU there is no libcuda, and it would fail.
    Check("trtllm-serve", ("sh", "-c", "command -v trtllm-serve"), required=True),
    Check("TensorRT-LLM", says("from importlib.metadata import version as v; "
                               "print('version', v('tensorrt_llm'))"),
          r"version (\S+)", required=True),
    Check("trtllm-llmapi-launch", ("sh", "-c", "command -v trtllm-llmapi-launch")),
    Check("PyTorch's NCCL", says("import torch; print('nccl', torch.cuda.nccl.version())"),
          r"nccl (.+)", required=True),
    Check("mpi4py", says("from mpi4py import MPI; print('mpi', MPI.Get_library_version())"),
          r"mpi (.+)", required=True),
    Check("Open MPI", ("ompi_info", "--version"), r"(Open MPI v\S+)"),
    Check("PMIx", ("pmix_info", "--version"), r"(?:PMIx[^:=]*[:=]?\s*v?)([\d.]+\S*)"),
    Check("PMIx in Open MPI", ("ompi_info", "--param", "pmix", "all"), r"MCA pmix: (.+)"),
    Check("libfabric", ("fi_info", "--version"), r"libfabric: (\S+)"),
    Check("EFA provider", ("fi_info", "-l"), r"^(efa.*)"),
    Check("NCCL plug-in for EFA", library="libnccl-net-ofi.so*"),
    Check("NCCL tuner for EFA", library="libnccl-tuner-ofi.so*"),
    Check("GDRCopy", library="libgdrapi.so*"),
)  # fmt: skip


def find(check: Check) -> str:
    """What there is, in a few words; '' if it is missing."""
    if check.library:
        return find_library(check.library)
    if not shutil.which(check.command[0]):
        return ""
    try:
        done = subprocess.run(check.command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(check.pattern, done.stdout + done.stderr, re.M)
    return found[1].strip() if found and done.returncode == 0 else ""


def find_library(pattern: str) -> str:
    found = sorted(str(p) for d in LIBRARIES for p in Path(d).glob(pattern))
    if found:
        return found[0]
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"  # a user's PATH may lack /sbin
    try:
        cache = subprocess.run([ldconfig, "-p"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    stem = pattern.partition("*")[0].removesuffix(".so")
    return next((s.rpartition("=> ")[2] for s in cache.splitlines() if stem in s), "")


def main(checks: Sequence[Check] = CHECKS) -> int:
    missing = False
    for check in checks:
        found = find(check)
        missing |= check.required and not found
        word = found or ("MISSING" if check.required else "absent")
        print(f"{check.name:22} {word}", flush=True)
    return int(missing)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    sys.exit(main())
