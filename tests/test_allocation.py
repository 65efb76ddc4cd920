"""What Slurm says of a job, whatever a shell's environment has left of another."""

from __future__ import annotations

import contextlib
import os
import re

import pytest

from common.talk import Failure
from launch import slurm
from launch.nodes import Place, expand, find_place
from launch.plan import Replica
from launch.preflight import refuse_gpus_of_jobs
from launch.runtimes import bare
from launch.slurm import Share, allocation_of, record_of, share_of
from tests.conftest import Fakes, plan

pytestmark = pytest.mark.usefixtures("clean_environment")

# `scontrol show job -d 41` of Slurm 22.05: 41 is the array and the last of its tasks. Names and
# comments are the user's own, and may say anything.
ARRAY = """\
JobId=41 ArrayJobId=41 ArrayTaskId=3 JobName=x NumNodes=9 JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   NodeList=n[1-2]
   BatchHost=n1
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   JOB_GRES=gpu:10
     Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:8(IDX:0-7)
     Nodes=n2 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0,5)
   Comment=Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:8(IDX:0-7) NodeList=n9

JobId=43 ArrayJobId=41 ArrayTaskId=2 JobName=x
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   NodeList=n7
     Nodes=n7 CPU_IDs=0 Mem=0 GRES=gpu:1(IDX:3)
"""
NODES = """\
NodeName=n1 Arch=x86_64 CoresPerSocket=1 Gres=gpu:8 NodeAddr=n1 State=MIXED CfgTRES=cpu=16
NodeName=n2 Arch=x86_64 CoresPerSocket=1 Gres=gpu:8(S:0-1) NodeAddr=n2 State=MIXED
"""
BARE_NODES = NODES.replace("Gres=gpu:8(S:0-1)", "Gres=(null)").replace("gpu:8", "shard:gpu:8")


def two(nodes: str) -> list[str]:
    return {"n[1-2]": ["n1", "n2"]}.get(nodes, [nodes])


def test_of_an_array_a_task_is_named_alone_and_has_gpus_of_its_own() -> None:
    third = allocation_of(record_of("41", ARRAY), NODES, two)
    assert (third.name, third.restarts) == ("41_3", 2)
    assert third.nodes == ("n1", "n2")
    assert third.shares == {
        "n1": Share(8, 8, "0,1,2,3,4,5,6,7"),
        "n2": Share(8, 2, "0,5"),
    }
    second = allocation_of(record_of("43", ARRAY), NODES.replace("n1", "n7"), two)
    assert (second.name, second.shares) == ("41_2", {"n7": Share(8, 1, "3")})
    assert record_of("4", ARRAY) == ""


# The same of job 7, a heterogeneous one: 8 is its second component.
HET = """\
JobId=7 HetJobId=7 HetJobOffset=0 JobName=x
   HetJobIdSet=7-8
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=n1
     Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:4(IDX:0-3)

JobId=8 HetJobId=7 HetJobOffset=1 JobName=x HetJobOffset=9
   HetJobIdSet=7-8
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=n2
     Nodes=n2 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)
"""


@pytest.mark.parametrize(
    ("job", "which", "node", "share"),
    [("7", "0", "n1", Share(8, 4, "0,1,2,3")), ("8", "1", "n2", Share(8, 2, "0,1"))],
)
def test_a_step_in_a_heterogeneous_job_names_its_component(
    fakes: Fakes, job: str, which: str, node: str, share: Share
) -> None:
    os.environ.update(fakes.environment())
    fakes.program("scontrol", f"import sys; print({HET!r} if 'job' in sys.argv else {NODES!r})")
    place = find_place({"SLURM_JOB_ID": job, "SLURM_HET_SIZE": "2"})
    assert place.allocation.shares == {node: share}
    assert place.allocation.name == f"7+{which}"  # as squeue shows it, for make stop
    clean = ["env", "-u", "SLURM_HET_SIZE", "srun"]
    assert place.every[:6] == [*clean, "--jobid=7", f"--het-group={which}"]


def test_where_slurm_hands_out_no_gpus_there_are_no_shares() -> None:
    assert allocation_of(record_of("41", ARRAY), BARE_NODES, two).shares == {}


ALL = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("ours", "every", "share"),
    [
        ("gpu:8(IDX:0-7)", "gpu:8", Share(8, 8, ALL)),
        ("gpu:4(IDX:0,2-3,7)", "gpu:8(S:0-1)", Share(8, 4, "0,2,3,7")),
        ("", "gpu:8", Share(8, 0, "")),
        ("(null)", "gpu:8", Share(8, 0, "")),
        ("gpu:0(IDX:)", "gpu:8", Share(8, 0, "")),
        (
            "gpu:h100:2(IDX:2-3),gpu:a100:1(IDX:0)",
            "gpu:a100:2(S:0),gpu:h100:2(S:1)",
            Share(4, 3, "0,2,3"),
        ),
        (
            "gpu:a100:2(IDX:0-1),gpu:h100:0(IDX:)",
            "gpu:a100:2,gpu:h100:2",
            Share(4, 2, "0,1"),
        ),
        ("gpu:3090:2(IDX:6-7)", "gpu:3090:8", Share(8, 2, "6,7")),
        ("gpu:1g.5gb:2(IDX:5-6)", "gpu:1g.5gb:7", Share(7, 2, "5,6")),
        # A part of a GPU that others share is no GPU of the job's.
        ("shard:h100:4(0/8,4/8),nic:1(IDX:0)", "gpu:h100:2,shard:h100:16", Share(2, 0, "")),
        ("craynetwork:1,gpu:1(IDX:1)", "craynetwork:4,gpu:2", Share(2, 1, "1")),
        # Without File= in gres.conf Slurm counts, and names none.
        ("gpu:2", "gpu:8", Share(8, 2, "")),
        ("gpu:2(CNT:2)", "gpu:8", Share(8, 2, "")),
        ("gpu:8(CNT:8)", "gpu:8", Share(8, 8, ALL)),
        ("gpu:1(IDX:0)", "(null)", Share(0, 1, "0")),
        # Where it does not show the node, a slice's number may be taken for a whole GPU's.
        ("gpu:h100:2(IDX:0,3)", "", Share(0, 2, "0,3")),
        ("gpu:a100_1g.5gb:2(IDX:5-6)", "", Share(0, 2, "")),
    ],
)
def test_gpus_are_read_however_they_were_asked_for(ours: str, every: str, share: Share) -> None:
    assert share_of(ours, every) == share


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_STEP_GPUS": "7"},
        {"SLURM_JOB_NUM_NODES": "9", "SLURM_GPUS_PER_NODE": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_slurm_says_what_a_job_is_and_not_the_environment(
    fakes: Fakes, left: dict[str, str]
) -> None:
    os.environ.update(fakes.environment())
    fakes.set(gpus="0,5")
    place = find_place({"SLURM_JOB_ID": "77", **left})
    assert (place.job, place.size, place.allocation.name) == ("77", 2, "77")
    assert place.allocation.shares["n2"] == Share(8, 2, "0,5")
    assert [word for word in place.every if "=" in word][-3:] == [
        "--nodes=2", "--ntasks=2", "--gres=none"
    ]  # fmt: skip
    assert "SLURM_GPUS_PER_NODE" in place.every or "SLURM_GPUS_PER_NODE" not in left


def test_without_a_container_the_step_is_given_the_jobs_gpus(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    fakes.set(gpus="0,5")
    made = plan(runtime="bare")
    for gpus, flag in (("auto", "--gpus=2"), ("none", "--gres=none")):
        replica = Replica("m", (), 8000, gpus)
        place = find_place({"SLURM_JOB_ID": "77"})
        there = bare.serve(type(made)(**{**vars(made), "place": place}), replica, {})
        assert flag in there.argv


@pytest.mark.parametrize(
    ("job", "state", "words"),
    [
        ("5", "", "asking Slurm about job 5 .* Invalid job id specified"),
        ("77", "JobState=COMPLETED\n   NodeList=n1", "job 77 does not run: .* COMPLETED"),
        ("77", "JobState=PENDING\n   NodeList=", "job 77 does not run: .* PENDING"),
        ("77", "JobState=RUNNING\n   NodeList=(null)", "job 77 does not run"),
    ],
)
def test_a_job_that_does_not_run_is_a_sentence(
    fakes: Fakes, job: str, state: str, words: str
) -> None:
    os.environ.update(fakes.environment())
    if state:
        fakes.program("scontrol", f"print('JobId={job} JobName=x\\n   ' + {state!r})")
    with pytest.raises(Failure, match=words) as failure:
        find_place({"SLURM_JOB_ID": job})
    assert "SLURM_JOB_ID" in failure.value.hint


@pytest.mark.parametrize(
    "said", ["Unable to contact slurm controller (connect failure)", slurm.TIMED_OUT]
)
def test_a_controller_that_does_not_answer_is_not_blamed_on_the_job(
    fakes: Fakes, said: str
) -> None:
    os.environ.update(fakes.environment())
    fakes.program("scontrol", f"import sys; sys.exit('slurm_load_jobs error: {said}')")
    with pytest.raises(Failure, match="asking Slurm about job 77 .*" + re.escape(said)) as failure:
        find_place({"SLURM_JOB_ID": "77"})
    assert "scontrol ping" in failure.value.hint and "SLURM_JOB_ID" not in failure.value.hint


SHOW = "import os; print('NodeName=' + os.uname().nodename.partition('.')[0], {!r})"


@pytest.mark.parametrize(
    ("used", "asked", "refused"),
    [
        ("gpu:2(IDX:0-1)", "auto", True),
        ("gpu:a100:0(IDX:N/A),gpu:h100:1(IDX:4)", "all", True),
        ("gpu:2(IDX:0-1)", "none", False),
        ("gpu:2(IDX:0-1)", '"device=5"', False),
        ("gpu:0", "auto", False),
        ("gpu:a100:0(IDX:N/A)", "auto", False),
        ("(null)", "auto", False),
        (None, "auto", False),  # a machine that Slurm does not know
    ],
)
def test_outside_of_a_job_the_gpus_of_jobs_are_not_taken(
    fakes: Fakes, used: str | None, asked: str, refused: bool
) -> None:
    os.environ.update(fakes.environment())
    fakes.program("scontrol", SHOW.format(f"Gres=gpu:8 GresUsed={used} x") if used else "exit(1)")
    here = Place("local1", 1, ())
    refuse_gpus_of_jobs(Place("77", 1, ("srun",)), asked)
    if not refused:
        refuse_gpus_of_jobs(here, asked)
        return
    with pytest.raises(Failure, match=r"Slurm has given GPUs of .* to jobs") as failure:
        refuse_gpus_of_jobs(here, asked)
    assert "salloc" in failure.value.hint
    fakes.without("scontrol")
    refuse_gpus_of_jobs(here, asked)


@pytest.mark.parametrize("alias", ["gpu-st-1", ""])
def test_slurm_may_call_this_machine_by_another_name(fakes: Fakes, alias: str) -> None:
    """As in clouds, whose machines have names of their own (NodeHostname)."""
    os.environ.update(fakes.environment())
    fakes.program("scontrol", f"""import os, sys
name = os.uname().nodename.partition(".")[0]
match sys.argv[1:]:
    case ["show", "aliases", asked] if asked == name:
        print({alias!r})
    case ["show", "node", "-d", "-o", "gpu-st-1"]:
        print("NodeName=gpu-st-1 Gres=gpu:8 GresUsed=gpu:2(IDX:0-1)")
    case ["show", "node", "-d", "-o", asked]:
        sys.exit(f"Node {{asked}} not found")
""")  # fmt: skip
    with pytest.raises(Failure) if alias else contextlib.nullcontext():
        refuse_gpus_of_jobs(Place("local1", 1, ()), "auto")


def test_a_list_of_nodes_is_slurms_to_expand(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    assert expand("n1") == ["n1"]
    assert expand("localhost,n2") == ["localhost", "n2"]
    assert fakes.calls() == [["scontrol", "show", "hostnames", "localhost,n2"]]


@pytest.mark.parametrize("private", [False, True])
def test_the_names_of_the_nodes_are_asked_for_only_if_slurm_does_not_show_the_nodes(
    fakes: Fakes, private: bool
) -> None:
    os.environ.update(fakes.environment())
    fakes.set(nodes=["n1", "n2"], private=private)
    assert find_place({"SLURM_JOB_ID": "77"}).allocation.nodes == ("n1", "n2")
    assert ("hostnames" in [call[2] for call in fakes.calls()]) == private
