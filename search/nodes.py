"""Which candidates are served at the same time: never two on one node."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Nodes:
    """A job's nodes, each with the same number of GPUs; without Slurm, one node without a name."""

    names: Sequence[str]
    gpus: int  # of each; 0: unknown, and then each candidate gets all nodes

    def __post_init__(self) -> None:
        self.free = [True] * len(self.names)

    def needed(self, gpus: int) -> int:
        return min(-(-gpus // self.gpus) if self.gpus else len(self.names), len(self.names)) or 1

    def take(self, gpus: int) -> list[str] | None:
        """Neighbouring free nodes with that many GPUs; None while there are none."""
        count = self.needed(gpus)
        for first in range(len(self.names) - count + 1):
            if all(self.free[first : first + count]):
                self.free[first : first + count] = [False] * count
                return list(self.names[first : first + count])
        return None

    def give_back(self, names: Sequence[str]) -> None:
        for name in names:
            self.free[self.names.index(name)] = True


def side_by_side(
    tasks: Sequence[T], gpus_of: Callable[[T], int], nodes: Nodes,
    work: Callable[[T, Sequence[str]], None], end_all: Callable[[], None],
) -> None:  # fmt: skip
    """Do all tasks, each on nodes of its own, as many at once as there is room for.

    A signal, or an error in one task, ends the others through `end_all` and is raised after that.
    """
    waiting, running = list(tasks), dict[Future[None], list[str]]()
    with ThreadPoolExecutor(len(nodes.names)) as threads:
        try:
            while waiting or running:
                for task in list(waiting):
                    if (names := nodes.take(gpus_of(task))) is not None:
                        waiting.remove(task)
                        running[threads.submit(work, task, names)] = names
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    nodes.give_back(running.pop(done))
                    done.result()
        except BaseException:
            end_all()
            raise
