"""The Dockerfile's shell, as far as it can be checked where the base image cannot be had."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[1] / "Dockerfile").read_text()
# As Docker's parser sees it: comment lines are gone, continued lines are one.
LINES = re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines()
RUNS = [line.removeprefix("RUN ") for line in LINES if line.startswith("RUN ")]
ENTRY = re.search(r"<<'EOT' /opt/nvidia/entrypoint.d/90-efa.sh\n(.*?)^EOT$", TEXT, re.S | re.M)


def bash(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", *arguments]
    return subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.split()[0] + str(len(script)))
def test_every_step_is_shell(script: str) -> None:
    done = bash("-n", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_steps_are_found() -> None:
    assert len(RUNS) == len(re.findall("^RUN ", TEXT, re.M)) == 3


def entered(tmp_path: Path, vendor: str, *devices: str, **env: str) -> dict[str, str]:
    """The environment after the base's entry point has sourced the script on such a machine."""
    assert ENTRY
    card = tmp_path / "sys/rdmap0/device"
    card.mkdir(parents=True)
    (card / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "dev").mkdir()
    for device in devices:
        (tmp_path / "dev" / device).touch()
    script = ENTRY[1].replace("/sys/class/infiniband", f"{tmp_path}/sys")
    script = script.replace("/dev/infiniband", f"{tmp_path}/dev")
    done = bash("-euc", f"{script}\nenv", **env)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize("given", ["", "aws-ofi"])
def test_with_efa_its_plugin_is_selected(tmp_path: Path, given: str) -> None:
    seen = entered(tmp_path, "0x1d0f", "uverbs0", "uverbs1", NCCL_NET_PLUGIN=given)
    assert seen["NCCL_NET_PLUGIN"] == "ofi"
    assert seen["FI_PROVIDER"] == "efa"
    assert seen["OMPI_MCA_pml"] == "^ucx"
    assert seen["OMPI_MCA_btl_tcp_if_exclude"].split(",")[0] == "lo"


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    given = {"NCCL_NET_PLUGIN": "none", "FI_PROVIDER": "tcp", "OMPI_MCA_btl_tcp_if_include": "eth0"}
    seen = entered(tmp_path, "0x1d0f", "uverbs0", **given)
    assert given.items() <= seen.items()
    assert "OMPI_MCA_btl_tcp_if_exclude" not in seen


@pytest.mark.parametrize(("vendor", "devices"), [("0x1d0f", ()), ("0x15b3", ("uverbs0",))])
def test_without_efa_nothing_of_it_is_on(
    tmp_path: Path, vendor: str, devices: tuple[str, ...]
) -> None:
    """No device was passed in, or the card is another maker's."""
    seen = entered(tmp_path, vendor, *devices, NCCL_NET_PLUGIN="ofi")
    assert not [name for name in seen if name.startswith(("NCCL_", "FI_", "OMPI_"))]
