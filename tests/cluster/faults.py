"""What goes wrong, and what the user sees of it: every fault in every phase, on a real cluster.

    make faults                    # all cells; the tables of docs/faults.md at the end
    make faults FAULTS=slurmd      # those whose name has this word (several: a,b)
    make faults FAULTS=scancel:serving
    make faults RUNTIME=pyxis      # the same under pyxis (pyxis_faults.py): docs/faults-pyxis.md

The same rows are tests (test_matrix.py: a phase of each) and docs/faults.md. Those of fleets are in
fleet_faults.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster.cluster import Cluster, why_not
from tests.cluster.fleet_faults import FLEET_FAULTS
from tests.cluster.launches import QUICK, prepare
from tests.cluster.scene import BACK, RECORDS, UNTIL, Cell, Expect, Fault, Outcome, play
from tests.cluster.strikes import (
    ALL,
    LOAD_3_S,
    STEPPED,
    UP,
    cancel,
    cells_of,
    close_terminal,
    docker,
    end_time,
    fill,
    interrupt_group,
    interrupt_twice,
    keep_busy,
    race_for_a_port,
    race_for_the_image,
    race_in_one_job,
    read_only,
    rename_over,
    replaced_tarball,
    restart_dockerd,
    send,
    set_clock,
    signal_salloc,
    small_file_system,
    stepped_clock,
    stop_dockerd,
    stop_slurmd,
    suspend,
    truncate_log,
    type_interrupt,
    unplug,
    unplugged_interrupt,
    warn,
)

DIED = ("n1: trtllm-serve ended with ",)

FAULTS: tuple[Fault, ...] = (
    # The launcher is told to stop, or ended.
    Fault("SIGINT to the launcher", send(signal.SIGINT), (
        Expect(ALL, ("stopped by SIGINT",), (130,), 20),)),
    Fault("SIGINT twice", interrupt_twice, (Expect(ALL, ("stopped by SIGINT",), (130,), 20),)),
    Fault("SIGTERM to the launcher", send(signal.SIGTERM), (
        Expect(ALL[:-1], ("stopped by SIGTERM",), (143,), 10),
        Expect(ALL[-1:], ("stopped by SIGINT",), (130,), 20)), ci=ALL),
    Fault("SIGHUP to the launcher", send(signal.SIGHUP), (
        Expect(ALL[:-1], ("stopped by SIGHUP",), (129,), 10),
        Expect(ALL[-1:], ("stopped by SIGINT",), (130,), 20))),
    Fault("SIGKILL to the launcher", send(signal.SIGKILL), (
        Expect(ALL, (), (0, 137), 10),), ci=ALL),
    Fault("^C of salloc", interrupt_group, (Expect(ALL, (), (1, 130), 20),)),
    Fault("^C at a terminal", type_interrupt, (
        Expect(ALL, ("stopped by SIGINT",), (130,), 20),), terminal=True),
    Fault("terminal closed", close_terminal, (Expect(ALL, (), (1, 129, -1), 20),), terminal=True),
    # Slurm ends the job.
    Fault("scancel", cancel, (
        Expect(ALL[:-1], ("Slurm ended the ",), (1,), 20),
        Expect(ALL[-1:], ("stopped by SIGINT",), (1, 130), 20)), ci=ALL),
    Fault("time limit", end_time, (Expect(("image load", "serving"), (), (1, 129, 137, 143), 70),),
        ci=()),
    Fault("salloc terminated", signal_salloc(signal.SIGTERM), (
        Expect(("image load", "serving"), ("Slurm ended the ",), (1,), 10),)),
    Fault("salloc killed", signal_salloc(signal.SIGKILL), (
        Expect(("serving",), (), (-9,), 10, serves=True, stop=cancel),)),
    # The container.
    Fault("container killed", docker("kill"), (
        Expect(UP, (*DIED, "exit code 137 (killed"), (1,), 3),)),
    Fault("container killed on the 2nd node", docker("kill", node="n2"), (
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15): its container ended",), (1,), 10),)),
    Fault("container out of memory", docker("update", "--memory=200m", "--memory-swap=200m"), (
        Expect(("serving",), (*DIED, "exit code 137 (killed"),
               (1,), 15),), env={"TRTLLM_SIM_FAULT": "out-of-memory:6"}),
    Fault("docker stop", docker("stop", "--time=2"), (
        Expect(("engine loading",), (*DIED, "terminated"), (1,), 5),
        Expect(("serving",), (*DIED, "exit code 137"), (1,), 5)), ci=("engine loading",)),
    # Docker.
    Fault("dockerd stopped on the 2nd node", stop_dockerd("n2"), (
        Expect(("before the launch",), ("n2: Docker does not answer: Cannot connect",), (1,), 15),
        Expect(("image load",), ("n2: docker load: ",), (1,), 20),
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15)",), (1,), 20)), ci=()),
    Fault("dockerd stopped", stop_dockerd("n1"), (
        Expect(UP, ("n1: ",), (1,), 20),), ci=()),
    Fault("dockerd hangs", lambda scene: scene.freeze(scene.n1, "dockerd"), (
        Expect(("before the launch",), ("n1: Docker does not answer: no answer within",), (1,), 25),
        Expect(("stopping",), ("may still be there (Docker does not answer)",),
               (130,), 20, left=UNTIL.format("Docker answered"))),
        holds=True, ci=()),
    Fault("dockerd restarted", restart_dockerd, (Expect(UP, ("n1: ",), (1,), 20),), ci=()),
    # Slurm's daemon of a node.
    Fault("slurmd stopped on the 2nd node", stop_slurmd("n2"), (
        Expect(("before the launch",), ("n2",), (1,), 30),
        Expect(("image load",), ("n2",), (1,), 70),
        Expect(("serving",), (), (130,), 30, serves=True),
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15): its slurmd",), (1,), 30)),
        env=QUICK, ci=("before the launch", "serving")),
    Fault("slurmd stopped", stop_slurmd("n1"), (
        Expect(("serving",), (), (130,), 30, serves=True),)),
    Fault("Slurm's warning signal (USR1)", warn, (
        Expect((*UP, "serving on 2 nodes"), (), (130,), 10, serves=True),), env=LOAD_3_S),
    Fault("job suspended for 12 s", suspend, (
        Expect(("serving on 2 nodes",), ("is suspended", "is resumed"), (130,), 10,
               serves=True),), ci=()),
    # The network.
    Fault("2nd node unreachable", unplug("n2"), (
        Expect(("before the launch",), ("n2: Slurm cannot start anything there",), (1,), 20),
        Expect(("image load",), ("n2: Slurm has lost this node",), (1,), 70, heals=90),
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15)",), (1,), 40, left=BACK, heals=90)),
        ci=()),
    Fault("node unreachable", unplug("n1"), (
        Expect(UP, ("n1: ",), (1,), 90, left=BACK, heals=90),), ci=()),
    Fault("^C while a node is unreachable", unplugged_interrupt("n1"), (
        Expect(UP, ("could not confirm that the container is gone", "stopped by SIGINT"),
               (130,), 20, left=BACK, heals=90),), ci=()),
    Fault("^C while the 2nd node is unreachable", unplugged_interrupt("n2"), (
        Expect(("image load",), ("stopped by SIGINT",), (130,), 20, heals=90),
        Expect(("serving on 2 nodes",), ("n2: the container trtllm-", "may still be there"),
               (130,), 20, left=BACK, heals=90)), ci=()),
    # The shared file system.
    Fault("file system read-only", read_only, (
        Expect(("before the launch",), ("logs cannot be written to: Read-only",), (1,), 5),
        Expect(UP, ("run_",), (130,), 10, serves=True, left=RECORDS)),
        env=LOAD_3_S, ci=("before the launch", "serving")),
    Fault("file system full", fill, (
        Expect(UP, (), (130,), 10, serves=True),), prepare=small_file_system, env=LOAD_3_S),
    # The image.
    Fault("tarball replaced by rename", replaced_tarball(rename_over), (
        Expect(("image load",), (), (130,), 30, serves=True),), env=QUICK),
    Fault("tarball removed", replaced_tarball(Path.unlink), (
        Expect(("image load",), (), (130,), 30, serves=True),), env=QUICK),
    Fault("tarball written over", replaced_tarball(lambda p: p.write_bytes(b"another")), (
        Expect(("image load",), ("n2: ", "is truncated or corrupt"), (1,), 30),)),
    # Two launches at the same moment.
    Fault("two launches in one job", race_in_one_job, (
        Expect(("before the launch",), ("another launch of job",), (1,), 60),)),
    Fault("two jobs, one port", race_for_a_port, (
        Expect(("before the launch",), ("n1: another server took",), (1,), 60),)),
    Fault("two jobs, one image", race_for_the_image, (
        Expect(("before the launch",), (), (130,), 60, serves=True),)),
    # The clock.
    Fault("clock set an hour ahead", set_clock(3600), (
        Expect(("image load", "engine loading", "serving"), (), (130,), 30, serves=True),
        Expect(("stopping",), ("stopped by SIGINT",), (130,), 20),),
        env={**STEPPED, **LOAD_3_S}, prepare=stepped_clock),
    Fault("clock set an hour back", set_clock(-3600), (
        Expect(("image load", "engine loading", "serving"), (), (130,), 30, serves=True),
        Expect(("stopping",), ("stopped by SIGINT",), (130,), 20),),
        env={**STEPPED, **LOAD_3_S}, prepare=stepped_clock),
    # The engine.
    Fault("engine exits", lambda _: None, (
        Expect(("engine loading",), (*DIED, "exit code 3", "before it was ready"), (1,), 5),),
        env={"TRTLLM_SIM_FAULT": "exit-loading:3", "TRTLLM_SIM_LOAD_SECONDS": "2"}),
    Fault("engine exits while serving", lambda _: None, (
        Expect(("serving",), (*DIED, "exit code 7", "while serving"), (1,), 5),),
        env={"TRTLLM_SIM_FAULT": "exit-serving:7:3"}),
    Fault("engine hangs", lambda _: None, (
        Expect(("engine loading",), ("n1: the server was not ready within 5 s",), (1,), 10),),
        env={"TRTLLM_SIM_FAULT": "hang-loading"}, args=("--ready-timeout", "5")),
    Fault("engine accepts and never answers", lambda _: None, (
        Expect(("engine loading",), ("n1: the server was not ready within 4 s",), (1,), 10),),
        env={**QUICK, "TRTLLM_SIM_FAULT": "hang"}, args=("--ready-timeout", "4")),
    Fault("engine answers 503 for ever", lambda _: None, (
        Expect(("serving",), ("n1: the server is up but no longer serves",
                              "/health answered 503"), (1,), 45),),
        env={"TRTLLM_SIM_FAULT": "503:1"}, ci=()),
    Fault("engine stops answering", lambda _: None, (
        Expect(("serving",), ("n1: the server is up but no longer serves",
                              "/health did not answer"), (1,), 110),),
        env={"TRTLLM_SIM_FAULT": "hang:1"}, ci=()),
    Fault("engine fails behind a good /health", lambda _: None, (
        Expect(("serving",), ("n1: the server is up but no longer serves: 3 requests for one token "
                              "in a row failed",), (1,), 15),),
        env={"TRTLLM_SIM_FAULT": "broken-engine:3", "PROBE_SECONDS": "1"}),
    Fault("hung engine core", lambda _: None, (
        Expect(("serving", "serving on 2 nodes"), ("n1: the server is up but no longer serves: it "
               "is idle, and in ",), (1,), 20),),
        env={"TRTLLM_SIM_FAULT": "stuck-engine:2", "PROBE_SECONDS": "1", "PROBE_TIMEOUT": "5"}),
    Fault("queue longer than PROBE_TIMEOUT", keep_busy, (
        Expect(("serving", "serving on 2 nodes"), ('"WatchClients": {',), (130,), 10,
               serves=True),),
        env={"TRTLLM_SIM_ITL_MS": "100", "PROBE_SECONDS": "1", "PROBE_TIMEOUT": "2"},
        args=("--max_batch_size", "1"), ci=()),
    # What it writes.
    Fault("log truncated in place", truncate_log, (
        Expect(("serving",), (), (130,), 10, serves=True),)),
    Fault("log flood of 100 MB/s", lambda _: time.sleep(3), (
        Expect(("engine loading", "serving"), (), (130,), 10, serves=True),),
        env={"TRTLLM_SIM_FAULT": "log-flood:100", "TRTLLM_SIM_LOAD_SECONDS": "3"}),
    Fault("binary and megabyte-long log lines", lambda _: None, (
        Expect(("engine loading", "serving"), (), (130,), 10, serves=True),),
        env={"TRTLLM_SIM_FAULT": "binary-log", "TRTLLM_SIM_LOAD_SECONDS": "2"}),
)  # fmt: skip

CELLS = cells_of((*FAULTS, *FLEET_FAULTS))


# --- the command ---------------------------------------------------------------------------------


def chosen(words: str, cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose name has one of the words; all of them if none is given."""
    wanted = [word.strip().lower() for word in words.split(",") if word.strip()]
    return [c for c in cells if not wanted or any(word in c.name.lower() for word in wanted)]


def table(outcomes: Sequence[tuple[Cell, Outcome]]) -> str:
    """Markdown: a row per fault and outcome, its phases together."""
    rows: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for cell, outcome in outcomes:
        key = (cell.fault.name, outcome.says, str(outcome.code), outcome.left)
        rows.setdefault(key, []).append((cell.phase, outcome.seconds))
    head = ["| fault | phase | what the user sees | exit | seconds | left behind |",
            "|---|---|---|--:|--:|---|"]  # fmt: skip
    return "\n".join([*head, *(row(key, phases) for key, phases in rows.items())])


def row(key: Sequence[str], phases: Sequence[tuple[str, float]]) -> str:
    name, says, code, left = (word.replace("|", r"\|") for word in key)
    where = ", ".join(phase for phase, _ in phases)
    seconds = max(seconds for _, seconds in phases)
    return f"| {name} | {where} | {says} | {code} | {seconds:.1f} | {left} |"


def main(
    argv: Sequence[str] | None = None,
    every: Sequence[Cell] = CELLS,
    prepared: Callable[[Cluster], object] = prepare,
) -> int:
    parser = argparse.ArgumentParser(description="Play the faults on a cluster; print the table.")
    parser.add_argument("words", nargs="?", default=os.environ.get("FAULTS", ""))
    cells = chosen(parser.parse_args(argv).words, every)
    if not cells:
        parser.error("no fault has that in its name")
    if reason := why_not():
        raise SystemExit(f"faults: {reason}")
    outcomes = []
    try:
        with Cluster(nodes=2) as cluster:
            prepared(cluster)
            for cell in cells:
                if outcome := attempt(cell, cluster):
                    outcomes.append((cell, outcome))
    finally:
        for fleet in (False, True):
            if of_kind := [each for each in outcomes if each[0].fault.fleet == fleet]:
                print(table(of_kind), end="\n\n")
    return 0 if len(outcomes) == len(cells) else 1


def attempt(cell: Cell, cluster: Cluster) -> Outcome | None:
    """Play a cell and say at once how it went; None if it did not go as it must."""
    begun = time.monotonic()
    try:
        outcome = play(cell, cluster)
    except Exception as error:  # the others are played all the same
        print(f"FAILED {cell.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
    took = time.monotonic() - begun
    print(f"{cell.name:45} {outcome.code:4} {outcome.seconds:6.1f} s ({took:.1f} s in all)  "
          f"{outcome.says}; left: {outcome.left}", file=sys.stderr, flush=True)  # fmt: skip
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())
