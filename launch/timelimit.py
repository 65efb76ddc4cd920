"""The job's time limit: announced before it is reached."""

import re
import subprocess
import threading
import time

from common.signals import pause
from common.talk import say
from launch.node.base import unfiltered
from launch.nodes import Place
from launch.slurm import squeue

LOOK_EVERY = 2.0  # seconds between two questions whether the job is suspended
NOTICE = 600.0  # seconds before the end at which we say so
COMPLETES_WITHIN = 5.0  # seconds; Slurm names the reason only after COMPLETING
ASLEEP = ("SUSPENDED", "STOPPED")
BEGINS = ("CONFIGURING", "POWER_UP_NODE", "EXPEDITING")  # the last two are newer versions'
GOES_ON = ("RUNNING", *ASLEEP, *BEGINS, "RESIZING", "SIGNALING")
ASK_EVERY = 300.0  # a limit can be changed: scontrol update JobId=... TimeLimit=...


class TimeLimit(threading.Thread):
    """Asks Slurm how long the job may still run. Without Slurm or a limit it says nothing."""

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        self.job = place.job if place.slurm else ""
        self.ended = threading.Event()
        self.end_at: float | None = None  # by time.monotonic()
        self.told: float | None = None  # the end that we last announced
        self.known = False  # Slurm has listed this job before
        self.asking: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        if self.job:
            self.start()

    def run(self) -> None:
        while not self.ended.is_set():
            wait = ASK_EVERY
            if (left := self._ask()) is not None:
                self.end_at = time.monotonic() + left
                if left <= NOTICE:
                    self._tell(left)
                else:
                    wait = min(wait, left - NOTICE)
            self.ended.wait(wait)

    def _ask(self) -> float | None:
        """Seconds left; None without a limit, or if Slurm does not say."""
        ask = ["squeue", "--all", "--noheader", *of_job(self.job, "%A %L")]
        env, out, null = unfiltered(), subprocess.PIPE, subprocess.DEVNULL
        try:
            self.asking = subprocess.Popen(
                ask, env=env, stdin=null, stdout=out, stderr=null, text=True, start_new_session=True
            )
        except OSError:
            return None
        return seconds(self._note(self.asking.communicate()[0]))

    def _tell(self, left: float) -> None:
        end = time.monotonic() + left
        if self.told is not None and abs(end - self.told) < 60:
            return
        self.told = end
        when = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() + left))
        limit = f"the job reaches its time limit in {words(left)} ({when})"
        say(f"{limit}; Slurm will then end the server")

    def is_reached(self) -> bool:
        """Whether the end that Slurm last named has come."""
        return self.end_at is not None and time.monotonic() > self.end_at - 2

    def how_it_ended(self) -> str:
        """What has become of the job, in words; '' while it runs, or if nobody says."""
        if not self.job:
            return ""
        deadline = time.monotonic() + COMPLETES_WITHIN
        # While it is COMPLETING, Slurm names no reason.
        while (now := self._state())[0] == "COMPLETING" and time.monotonic() < deadline:
            time.sleep(0.2)
        state, left = now
        # Our last answer may be minutes old, and the limit may have been raised since.
        goes_on = state == "RUNNING" and (left == "UNLIMITED" or (seconds(left) or 0) > 2)
        if state == "TIMEOUT" or (self.is_reached() and not goes_on):
            return "has reached its time limit"
        if state in ("", *GOES_ON):
            return ""
        return "has ended" if state == "COMPLETING" else f"has ended ({state.lower()})"

    def _state(self) -> tuple[str, str]:
        """What squeue says now: the job's state and the time left; '' if it does not say."""
        if not (done := squeue(*of_job(self.job, "%A %T %L"))):
            return "", ""
        if "Invalid job id" in done.stderr:  # if it never knew the job, that proves nothing
            return ("GONE" if self.known else ""), ""
        state, _, left = self._note(done.stdout).partition(" ")
        return state, left

    def _note(self, text: str) -> str:
        """What squeue says about our job; once it has said anything, it knows the job."""
        said = answer(self.job, text)
        self.known = self.known or bool(said)
        return said

    def end(self) -> None:
        self.ended.set()
        if self.asking:
            self.asking.kill()


def is_suspended(place: Place) -> bool:
    """Whether Slurm has stopped the job's processes for a while."""
    return place.slurm and state_of(place.job) in ASLEEP


def state_of(job: str) -> str:
    """What Slurm calls the job's state; '' if it does not say."""
    done = squeue(*of_job(job, "%A %T %L")) if job.isdecimal() else None
    return answer(job, done.stdout).partition(" ")[0] if done else ""


def outlast_suspension(place: Place, over: threading.Event) -> float:
    """Wait while the job is suspended; return how many seconds that took, 0 if it was not."""
    if not is_suspended(place):
        return 0.0
    begun = time.monotonic()
    say(f"job {place.job} is suspended (scontrol suspend, or another job's turn): waiting")
    while is_suspended(place):
        pause(over, LOOK_EVERY)
    say(f"job {place.job} is resumed")
    return time.monotonic() - begun


def of_job(job: str, what: str) -> list[str]:
    every = "--states=all"  # jobs that have ended are not listed otherwise
    return [every, f"--jobs={job}", f"--format={what}"]


def answer(job: str, text: str) -> str:
    """What follows our job's id: squeue has a line for each job of an array or of a het job."""
    lines = (line.strip().partition(" ") for line in text.splitlines())
    return next((rest.strip() for first, _, rest in lines if first == job), "")


def seconds(text: str) -> float | None:
    """squeue's `[days-][hours:]minutes:seconds`; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def words(left: float) -> str:
    return f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
