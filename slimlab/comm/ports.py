"""A rank's connection to a dialled network: what its two directions are busy with, and stamps.

Parts of slimlab.comm.network, which says what the model is. Simulators of networks (SimGrid, ns-3)
share links between messages of all ranks, which takes one queue of events for the whole world; here
each rank reckons with its own port and with the stamps of what it receives, so the result does not
depend on the order in which the ranks happen to run.
"""

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable
from math import inf
from weakref import WeakKeyDictionary

import torch

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Call, Handle
from slimlab.comm.wrapped import quiet_twin

# A gap that is too short by a rounding error is long enough.
ROUNDING = 1e-9


class Lane:
    """One direction of a port: it carries one message at a time."""

    def __init__(self):
        self._busy: list[tuple[float, float]] = []

    def take(self, earliest_s: float, seconds: float) -> float:
        """Find the first time at which the lane is free for long enough, and keep it busy then.

        earliest_s  not before
        seconds     for so long
        returns     when it begins
        """
        start_s = earliest_s
        index = max(0, bisect_right(self._busy, (start_s, inf)) - 1)
        while index < len(self._busy):
            begin_s, end_s = self._busy[index]
            if begin_s > start_s and begin_s - start_s >= seconds * (1 - ROUNDING):
                break
            start_s = max(start_s, end_s)
            index += 1
        if seconds:
            insort(self._busy, (start_s, start_s + seconds))
        return start_s


class Port:
    """A rank's connection to the network, shared by all groups that the rank is in."""

    def __init__(self):
        self.outgoing, self.incoming = Lane(), Lane()


class SharedStamps:
    """When messages left, told from thread to thread.

    comm  a group's communicator, of ranks that are threads
    """

    _of_worlds: WeakKeyDictionary = WeakKeyDictionary()

    def __init__(self, comm: Communicator):
        self._comm = comm
        self._stamps = self._of_worlds.setdefault(comm._world, {})
        self._numbers = Counter()

    def send(self, leaves_s: float, dst: int, tag: int) -> Handle:
        """Say when the next message leaves.

        leaves_s  its first byte, in seconds
        dst       where it goes
        tag       of the message
        returns   a handle to wait for
        """
        self._stamps[self._key(self._comm.rank, dst, tag)] = leaves_s
        return Handle(lambda: None)

    def recv(self, src: int, tag: int) -> Callable[[], float]:
        """Begin to receive the stamp of the next message.

        src      where it comes from
        tag      of the message
        returns  what gives the stamp once the message is there
        """
        key = self._key(src, self._comm.rank, tag)
        return lambda: self._stamps.pop(key)

    def _key(self, src: int, dst: int, tag: int) -> tuple:
        link = self._comm._among.context, src, dst, tag
        self._numbers[link] += 1
        return *link, self._numbers[link]


class SentStamps:
    """When messages left, told in small messages beside them.

    comm  a communicator

    Communicates: one split when it is made, one message of 8 bytes for every message.
    """

    def __init__(self, comm: Communicator):
        self._twin = quiet_twin(comm, "DialledCommunicator")

    def send(self, leaves_s: float, dst: int, tag: int) -> Handle:
        """Say when the next message leaves; `leaves_s`, `dst`, `tag` as in SharedStamps.send."""
        stamp = torch.tensor(leaves_s, dtype=torch.float64, device=self._twin.device)
        return self._twin._isend(Call("isend"), stamp, dst, tag)

    def recv(self, src: int, tag: int) -> Callable[[], float]:
        """Begin to receive the next stamp; `src` and `tag` as in SharedStamps.recv."""
        handle = self._twin._irecv(Call("irecv"), src, tag, None)
        return lambda: handle.wait().item()
