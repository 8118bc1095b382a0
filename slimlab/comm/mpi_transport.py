"""How a rank hands work to MPI, waits for it, and hears of its errors.

Chapter 07 uses it through slimlab.comm.mpi. MPI moves a large message only while both ranks are
inside of MPI, and only once the receiver has named its memory. So a rank that waits for anything
also looks after the receives it has started (slimlab.comm.mpi_messages).

MPI waits by looking without end, which keeps a core busy and gives the shortest delay. That is
right where every rank has a core to itself, as in production. Four ranks on two cores that others
use too are ten times faster if they sleep between looks. Importing this module starts MPI.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable

from mpi4py import MPI

from slimlab.comm.calls import Progress
from slimlab.comm.report import CommunicationError
from slimlab.config import require

SLEEP_VARIABLE = "SLIMLAB_MPI_SLEEP"
POLLS_BEFORE_SLEEP, POLLS_WITH_A_CORE = 20, 2000
# From here on, collectives that are only started take up to three times as long with Open MPI.
STARTED_BYTES = 65536
FIRST_SLEEP_S, LONGEST_SLEEP_S, SLEEP_GROWTH = 1e-6, 1e-3, 1.1


class Transport:
    """How one rank hands work to MPI and waits for it; shared by its world and all groups.

    rank      of the world
    progress  names the call in errors
    sleeps    wait by looking again and again with sleeps in between. MPI's own waiting keeps a
              core busy, which others need where there are more ranks than cores
    """

    def __init__(self, rank: int, progress: Progress, sleeps: bool):
        self.rank, self.progress, self.sleeps = rank, progress, sleeps
        self.queues: dict[tuple, deque] = {}
        # Messages that this rank sent less those that it received, by group, src, dst and tag.
        self.balance: Counter[tuple] = Counter()

    def run(self, comm: MPI.Comm, name: str, *args: object) -> None:
        """Send or receive, and wait until that is done.

        comm  the communicator of MPI
        name  "Send", "Recv" and the like
        args  as mpi4py takes them
        """
        if self.sleeps or self.queues:
            self.wait(self.start(comm, name, *args))
        else:
            self.block(comm, name, *args)

    def block(self, comm: MPI.Comm, name: str, *args: object) -> None:
        """Wait inside of MPI for a call; receives that were started do not go on meanwhile.

        comm  the communicator of MPI
        name  "Send", "Allreduce" and the like
        args  as mpi4py takes them
        """
        try:
            getattr(comm, name)(*args)
        except MPI.Exception as error:
            raise self._failure(error) from error

    def collect(
        self, comm: MPI.Comm, name: str, n_bytes: int, all_have_come: bool, *args: object
    ) -> None:
        """Make a collective call, and wait until it is done.

        comm           the communicator of MPI
        name           "Allreduce" and the like
        n_bytes        of the payload; the same on every rank
        all_have_come  no rank is elsewhere any more, for instance in a send
        args           as mpi4py takes them
        """
        # Whether a rank waits inside of MPI must be the same on all: the two forms do not mix. A
        # rank inside cannot look after receives, so it goes there when all have come.
        if self.sleeps or not (all_have_come or n_bytes >= STARTED_BYTES):
            self.wait(self.start(comm, name, *args))
            return
        if not all_have_come:
            self.wait(self.start(comm, "Barrier"))
        self.block(comm, name, *args)

    def start(self, comm: MPI.Comm, name: str, *args: object) -> MPI.Request:
        """Start a call.

        comm     the communicator of MPI
        name     of the form that waits: "Send", "Allreduce" and the like
        args     as mpi4py takes them
        returns  what wait takes
        """
        try:
            return getattr(comm, "I" + name.lower())(*args)
        except MPI.Exception as error:
            raise self._failure(error) from error

    def wait(self, request: MPI.Request) -> None:
        """Wait for a call that was started.

        request  what start returned
        """
        if self.sleeps or self.queues:
            self.look_until(request.Test)
            return
        try:
            request.Wait()
        except MPI.Exception as error:
            raise self._failure(error) from error

    def look_until(self, done: Callable[[], bool]) -> None:
        """Look again and again, after started receives too, and sleep in between.

        done  looks, and tells whether what the rank waits for is done
        """
        polls, pause_s = 0, FIRST_SLEEP_S
        most = POLLS_BEFORE_SLEEP if self.sleeps else POLLS_WITH_A_CORE
        try:
            while not done():
                if self.queues:
                    self.look_after_receives()
                polls += 1
                if polls > most:
                    time.sleep(pause_s)
                    pause_s = min(pause_s * SLEEP_GROWTH, LONGEST_SLEEP_S)
        except MPI.Exception as error:
            raise self._failure(error) from error

    def look_after_receives(self) -> None:
        """Name the memory for every payload whose header has come."""
        for key in list(self.queues):
            queue = self.queues[key]
            while queue and queue[0].header.Test():
                queue.popleft().open()
            if not queue:
                del self.queues[key]

    def _failure(self, error: MPI.Exception) -> CommunicationError:
        return CommunicationError(
            f"MPI failed on rank {self.rank} in {self.progress.call}: {error}\n"
            "change: see what MPI says; ranks that bring different numbers of elements look like "
            "this with check=False, and check=True names them"
        )


def sleeps_when_waiting(comm: MPI.Comm) -> bool:
    """Tell how ranks are to wait: with sleeps if any host has fewer cores than ranks.

    The variable SLIMLAB_MPI_SLEEP, 1 or 0 on all ranks, decides otherwise, for instance 1 where
    other programs use the cores too.

    comm     of all ranks
    returns  the same on every rank

    Communicates: a few bytes from every rank.
    Raises InputError for another value of the variable.
    """
    wish = os.environ.get(SLEEP_VARIABLE)
    require(
        wish in (None, "0", "1"),
        f"{SLEEP_VARIABLE}: 1 to sleep between looks, 0 to look without end",
        f"{SLEEP_VARIABLE}={wish}",
        "unset it: then ranks and cores are counted",
    )
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    here = host.size > len(set().union(*host.allgather(set(cores))))
    host.Free()
    return comm.allreduce(here if wish is None else wish == "1", op=MPI.LOR)
