"""Receives that have been started go on while their rank waits for something else.

Chapter 07 uses it through slimlab.comm.distributed. What a message holds is known when its header
has come; only then its payload can be asked for. A rank that waits in another call meanwhile would
keep the sender waiting, and with it perhaps all. So while receives are open a rank does not wait in
gloo itself: a thread of its own does, and the rank looks whether headers have come.

MPI calls this progress; it too happens inside of calls only. Production programs know the sizes of
their messages and need none.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

# How often to look at once, and how long to sleep between two looks after that.
NUM_EAGER_LOOKS = 20
PAUSE_S = 50e-6


class Queue(Protocol):
    """Receives of one address that have been started, in their order.

    watched  somebody waits for the first of them already
    """

    watched: bool

    def look(self) -> None:
        """Go on with those whose header has come."""


class Lookout:
    """What one rank has to look after, in all of its groups.

    queues  of started receives whose header has not been read
    """

    def __init__(self):
        self.queues: dict[object, Queue] = {}
        self._waiter: ThreadPoolExecutor | None = None

    def wait(self, wait: Callable[[], object]) -> None:
        """Wait, and look after started receives meanwhile.

        wait  waits, in gloo
        """
        if not self.queues or not self._others():
            wait()
            return
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, "slimlab-waiter")
        self.result(self._waiter.submit(wait))

    def result(self, future: Future) -> object:
        """Wait for what another thread does, and look after started receives meanwhile.

        future   of the other thread's result
        returns  the result
        """
        num_looks = 0
        while self._others() and not future.done():
            for queue in self._others():
                queue.look()
            num_looks += 1
            time.sleep(PAUSE_S if num_looks > NUM_EAGER_LOOKS else 0)
        return future.result()

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._waiter is not None:
            self._waiter.shutdown(wait=False)  # after a failure it may wait for long

    def _others(self) -> list[Queue]:
        return [queue for queue in self.queues.values() if not queue.watched]
