"""Serving on the real cluster: from a cold image to a clean end, and side by side with others."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.cluster import PATIENCE, Cluster, build_image, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import (
    PYTHON,
    QUICK,
    REPO,
    TAG,
    TARBALL,
    forget_image,
    ours,
    serve_args,
    smoke,
    traces,
)


def test_a_cold_start_ends_in_a_server_that_passes_the_api_checks(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    forget_image(cluster)
    started = launch(*serve_args(), env=QUICK)
    started.until("READY")
    assert started.output.count("there after") == 1, started.output  # one node serves
    assert "http://10.77.0.11:8000 serves org/model" in started.output
    endpoint = json.loads((workspace / "logs/endpoint.json").read_text())
    assert endpoint["nodes"] == ["n1", "n2"]
    assert endpoint["container"] == f"trtllm-{started.job}-n1"
    assert "8/8" in smoke(cluster, endpoint["url"])
    assert started.stop() == 130
    assert ours(cluster) == []
    assert "Uvicorn running" in Path(endpoint["log"]).read_text()
    before = started.output.partition("READY")[0].splitlines()
    assert len(before) <= 10, before
    assert "cpu binding" not in started.output and "CANCELLED" not in started.output


def test_an_image_that_is_there_is_not_loaded_again(launch: Launcher) -> None:
    for _ in range(2):
        started = launch(*serve_args(), env=QUICK)
        started.until("READY")
        started.stop()
    assert "image: n1: there after" not in started.output


def test_the_container_has_the_devices_gpus_and_names_of_its_node(
    cluster: Cluster, launch: Launcher
) -> None:
    env = {**QUICK, "NCCL_DEBUG": "WARN", "HF_TOKEN": "hf_secret", "OTHER": "no"}
    started = launch(*serve_args(), env=env)
    started.until("READY")
    seen = json.loads(cluster.nodes["n1"].docker("inspect", f"trtllm-{started.job}-n1"))[0]
    devices = {d["PathOnHost"] for d in seen["HostConfig"]["Devices"]}
    assert devices == {"/dev/gdrdrv", *(f"/dev/infiniband/uverbs{i}" for i in range(4))}
    assert seen["HostConfig"]["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert not seen["HostConfig"]["Privileged"]
    variables = dict(v.partition("=")[::2] for v in seen["Config"]["Env"])
    assert variables["NCCL_DEBUG"] == "WARN" and variables["HF_TOKEN"] == "hf_secret"
    assert variables["NCCL_SOCKET_IFNAME"] == variables["GLOO_SOCKET_IFNAME"] == "eth0"
    assert not [name for name in variables if name.startswith(("SLURM", "PMI", "OTHER"))]
    started.stop()


def test_the_token_is_in_no_argument_log_or_output(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*serve_args(), env={**QUICK, "HF_TOKEN": "hf_secret"})
    started.until("READY")
    arguments = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "trtllm-serve org/model" in arguments and "hf_secret" not in arguments
    dry = launch(*serve_args("--dry-run"), env={**QUICK, "HF_TOKEN": "hf_secret"}, salloc="")
    assert dry.code() == 0
    started.stop()
    for path in workspace.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path


def test_a_rebuilt_image_of_the_same_tag_is_loaded_and_served(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    node, tarball = cluster.nodes["n2"], workspace / "rebuilt.tar.zst"
    for version, engine in (("2", "1.1.0"), ("3", "1.2.1")):
        build_image(node, REPO / "simulator", TAG, version, engine=engine)
        node.run(PYTHON, str(REPO / "save_image.py"), TAG, "-o", str(tarball))
        node.docker("rmi", TAG)
        # Each on a port of its own: 1.2.1 waits for one that a server has just had.
        port = f"--port=800{version}"
        started = launch("--image", str(tarball), "m", port, env=QUICK)
        started.until("READY")
        assert f"serves m, TensorRT-LLM {engine}" in started.output  # as the sidecar says
        name = f"trtllm-{started.job}-n1"
        assert f"IMAGE_VERSION={version}" in cluster.nodes["n1"].docker("inspect", name)
        started.stop()
        # Without the sidecar the tarball tells as much, only slower, and once.
        Path(f"{tarball}.json").unlink()
    # The nodes ask the image that they hold.
    checked = launch("--check", "--image", str(tarball), "m", "--tensor_parallel_size", "8")
    assert checked.code() == 0 and "TensorRT-LLM 1.2.1, TP 8: " in checked.output, checked.output
    forget_image(cluster)


def test_force_takes_only_this_image_and_loads_it_afresh(
    cluster: Cluster, launch: Launcher
) -> None:
    started = launch(*serve_args("--force"), env=QUICK)
    started.until("READY")
    assert "image: n1: there after" in started.output
    started.stop()


def test_two_jobs_on_the_same_nodes_leave_each_other_alone(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    args = ["--image", str(TARBALL), "org/model", "--tp_size", "4"]
    one = launch(*args, salloc="-N2 --gpus-per-node=4 --ntasks-per-node=1", env=QUICK)
    one.until("READY")
    half = "-N2 --ntasks=8 --ntasks-per-node=4 --gpus-per-task=1"
    two = launch(*args, "--port", "8001", salloc=half, env=QUICK)
    two.until("READY")
    given = [
        json.loads(cluster.nodes["n1"].docker("inspect", f"trtllm-{each.job}-n1"))[0]["HostConfig"][
            "DeviceRequests"
        ][0]["DeviceIDs"]
        for each in (one, two)
    ]
    assert sorted(given[0] + given[1]) == list("01234567")
    none = launch(*args, "--port", "8002", salloc="-N1")
    assert none.code() == 1 and "n1: the job has no GPU there" in none.output
    assert one.stop() == 130
    assert len(ours(cluster)) == 1
    assert "8/8" in smoke(cluster, "http://10.77.0.11:8001")
    assert two.stop() == 130


def test_sbatch_from_another_directory_runs_the_original(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    home = workspace / "a b's $x"
    elsewhere = workspace / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(REPO, home, symlinks=True)
    submit = [
        "sbatch",
        "--nodes=2",
        "--parsable",
        "../a b's $x/run_sbatch.py",
        "--image",
        str(TARBALL),
        "org/model",
        "--tp_size",
        "8",
    ]
    job = cluster.ctl.run(*submit, cwd=str(elsewhere), env=QUICK).stdout.strip()
    output = elsewhere / f"slurm-{job}.out"
    wait_until(lambda: output.exists() and "READY" in output.read_text(), "sbatch ready")
    assert len(ours(cluster)) == 1
    cluster.ctl.run("scancel", job)
    wait_until(lambda: ours(cluster) == [], "scancel: no container left")
    wait_until(lambda: not cluster.ctl.run("squeue", "-h").stdout.strip(), "job gone")
    assert traces(cluster, elsewhere) == [], output.read_text()
    assert (elsewhere / f"logs/trtllm_server_{job}.log").stat().st_size > 0


def test_make_stop_ends_one_task_of_an_array_and_then_the_other(
    cluster: Cluster, launch: Launcher, workspace: Path, request: pytest.FixtureRequest
) -> None:
    """From the login node. The last task of an array has the array's own number."""

    def call(*args: str) -> str:
        command = [PYTHON, str(REPO / "run_sbatch.py"), *args]
        return cluster.ctl.run(*command, cwd=str(workspace), check=False).stdout

    submit = ["sbatch", "--parsable", "--array=1-2", str(REPO / "run_sbatch.py"), *serve_args()]
    array = cluster.ctl.run(*submit, cwd=str(workspace), env=QUICK).stdout.strip()
    request.addfinalizer(lambda: cluster.ctl.run("scancel", "--quiet", array, check=False))
    wait_until(lambda: call("--status").count("\tready\t") == 2, "both ready")

    def is_told(task: int) -> bool:
        said = "".join(path.read_text() for path in workspace.glob("slurm-*.out"))
        return f"make stop JOB={array}_{task}\n" in said

    wait_until(lambda: is_told(1) and is_told(2), "how to stop them")  # once they see it ready, too
    call("--stop", f"{array}_2")
    other, *words = call("--status").split()
    assert int(other) > int(array)
    assert words == ["ready", "http://10.77.0.11:8000", "org/model"]
    endpoint = workspace / "logs/endpoint.json"
    wait_until(lambda: endpoint.exists() and other in endpoint.read_text(), "an endpoint")
    call("--stop")
    assert ours(cluster) == []
    assert not endpoint.exists()


def test_any_shell_that_names_the_job_has_its_nodes_and_gpus(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    """Whatever else is in its environment."""
    salloc = ["salloc", "-N2", "--ntasks=16", "--gpus-per-task=1", "--no-shell"]
    job = re.findall(r"allocation (\d+)", cluster.ctl.run(*salloc).stderr)[-1]
    command = [PYTHON, str(REPO / "run_sbatch.py"), "--check", *serve_args("--pp_size", "2")]
    stale = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS": "1", "SLURM_STEP_GPUS": "7"}
    step = ["srun", f"--jobid={job}", "--overlap", "-N1", "-n1"]
    for shell, environ in (([], {"SLURM_JOB_ID": job, **stale}), (step, {})):
        done = cluster.ctl.run(*shell, *command, cwd=str(workspace), env=environ, check=False)
        assert "8 ranks on each of n1, n2 (--mpi=pmix)" in done.stderr, done.stderr
    cluster.ctl.run("scancel", job)
    ended = cluster.ctl.run(*command, env={"SLURM_JOB_ID": job}, check=False)
    assert f"job {job} does not run" in ended.stderr
    wait_until(cluster.idle, "the nodes back")


@pytest.mark.parametrize("name", ["a b", "it's", 'a"b', "$HOME $(id)", "a,b", "a;b", "ünï"])
def test_paths_and_models_of_any_name_arrive_intact(
    cluster: Cluster, launch: Launcher, workspace: Path, name: str
) -> None:
    home = workspace / name
    home.mkdir()
    shutil.copy2(TARBALL, home / "image.tar.gz")
    shutil.copy2(f"{TARBALL}.json", home / "image.tar.gz.json")
    (home / f"m {name}").mkdir()
    (home / "parallel config.yaml").write_text("tensor_parallel_size: 2\n")
    started = launch(
        "--image",
        "image.tar.gz",
        "--container-mount",
        ".",
        f"./m {name}",
        "--config",
        "parallel config.yaml",
        cwd=str(home),
        env=QUICK,
    )
    started.until("READY")
    assert f"serves m {name}, TensorRT-LLM" in started.output
    shown = cluster.nodes["n1"].docker("ps", "--no-trunc", "--format", "{{.Command}}")
    assert "parallel config.yaml" in shown
    assert started.stop() == 130


def test_dry_run_prints_what_runs_and_runs_nothing(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    forget_image(cluster)
    dry = launch(*serve_args("--dry-run"), env=QUICK)
    assert dry.code() == 0
    assert not (workspace / "logs").exists()
    shown = re.sub(r"^(salloc|srun): .*\n|^\[.*\n", "", dry.output, flags=re.M)
    ask, load, serve, remove = re.split(r"^# .*\n", shown, flags=re.M)[1:]
    # Every block, pasted into a shell of the allocation, does what the launcher does with it.
    script = workspace / "pasted.sh"
    script.write_text(
        f"{ask}\n({load}) < <(exec sleep 20 2>&-)\n({serve}) < <(exec sleep 8 2>&-)\n{remove}\n"
    )
    shell = subprocess.Popen(
        cluster.ctl.argv(
            ["salloc", "-N2", "--gpus-per-node=8", "--exclusive", "bash", str(script)],
            str(workspace),
        ),
        env={**cluster.ctl.environment(), **QUICK},
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: len(ours(cluster)) == 1, "the pasted server")
    seen = shell.communicate(timeout=PATIENCE)[0]
    assert '"Present": {"id": "sha256:' in seen and "Uvicorn running" in seen, seen


def test_without_slurm_this_machine_is_the_node(
    cluster: Cluster, workspace: Path, launch: Launcher
) -> None:
    node = cluster.nodes["n1"]
    command = [PYTHON, str(REPO / "run_sbatch.py"), *serve_args("--port", "8123")]
    with (workspace / "out").open("wb") as sink:
        process = node.popen(
            *command,
            cwd=str(workspace),
            env=QUICK,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    output = workspace / "out"
    wait_until(lambda: "READY" in output.read_text() or process.poll() is not None, "ready")
    assert "http://127.0.0.1:8123 serves" in output.read_text(), output.read_text()
    answer = node.run(PYTHON, str(REPO / "test.py"), cwd=str(workspace))
    assert "8/8" in answer.stdout
    node.run(PYTHON, str(REPO / "run_sbatch.py"), "--stop", cwd=str(workspace))
    assert process.wait(PATIENCE) == 143


def test_runtime_bare_serves_with_the_engine_of_the_path(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    path = f"{REPO}/simulator:/usr/sbin:/usr/bin:/sbin:/bin"
    started = launch(
        "--runtime", "bare", "org/model", "--tp_size", "8", env={**QUICK, "PATH": path}
    )
    started.until("READY")
    assert "8/8" in smoke(cluster, started.url())
    assert started.stop() == 130


def test_ready_is_said_at_once(launch: Launcher) -> None:
    started = launch("-v", *serve_args(), env={"TRTLLM_SIM_LOAD_SECONDS": "2"})
    assert started.until("Uvicorn running") <= started.until("READY")
    assert started.stop() == 130


def test_check_reports_every_node_and_starts_nothing(launch: Launcher, workspace: Path) -> None:
    started = launch(*serve_args("--check"))
    assert started.code() == 0, started.output
    table = [line.split() for line in started.output.splitlines()]
    assert {row[0] for row in table if row} >= {"node", "n1", "n2"}
    assert not (workspace / "logs").exists()


def test_a_pasted_curl_line_works(cluster: Cluster, launch: Launcher) -> None:
    started = launch(*serve_args(), env=QUICK)
    started.until("stop it with")
    curl = started.output.partition(" curl ")[2].replace("\\\n", " ")
    body = shlex.split(curl.splitlines()[0])[-1]
    assert json.loads(body)["model"] == "org/model"
    started.send(signal.SIGINT)
    assert started.code() == 130
