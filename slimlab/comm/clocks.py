"""Clocks of ranks: one that is computed, one that is measured, and how far two are apart.

Chapter 07 reads times of several ranks side by side, which needs one clock. The offset between two
is estimated as Cristian did (1989, Distributed Computing 3): ask for the time, and take the answer
for the middle of the round trip. However the trip's two halves divide, the error is at most half
of it, so the shortest trip of several bounds it best.

Production tools do the same over many hours, and fit a drift as well (Score-P, NTP); here an offset
holds for a run of seconds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimlab.comm.base import Communicator

ROUND_TRIPS = 20


@dataclass(frozen=True)
class ClockOffset:
    """How a rank's clock stands to that of rank 0.

    offset_s       seconds to add to the rank's clock for that of rank 0
    uncertainty_s  how far offset_s may be wrong, either way
    """

    offset_s: float
    uncertainty_s: float


class VirtualClock:
    """A clock that moves only when it is told to.

    now_s  where it stands at first, in seconds
    """

    def __init__(self, now_s: float = 0.0):
        self._now_s = now_s

    def now_s(self) -> float:
        """Return the time in seconds."""
        return self._now_s

    def advance_to(self, time_s: float) -> None:
        """Move forward, never back.

        time_s  the time that it is to show at least
        """
        self._now_s = max(self._now_s, time_s)


class WallClock:
    """The machine's clock; to move it forward is to sleep.

    zero_s  what time.perf_counter() shows when this clock shows 0
    """

    def __init__(self, zero_s: float):
        self._zero_s = zero_s

    def now_s(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter() - self._zero_s

    def advance_to(self, time_s: float) -> None:
        """Sleep until a time, if it has not passed.

        time_s  the time that this clock is to show at least
        """
        while (rest_s := time_s - self.now_s()) > 0:
            time.sleep(rest_s)


def align_clocks(comm: Communicator, now_s: Callable[[], float]) -> ClockOffset:
    """Estimate how far this rank's clock is from that of rank 0.

    comm     a communicator of which no other message is under way
    now_s    reads this rank's clock, in seconds
    returns  of this rank; on rank 0, and where all ranks are threads, exactly 0

    Communicates: ROUND_TRIPS messages of 8 bytes from rank 0 to every other, and as many back.
    """
    if comm.backend == "threads":
        return ClockOffset(0.0, 0.0)
    if comm.rank == 0:
        for rank in range(1, comm.world_size):
            for _ in range(ROUND_TRIPS):
                comm.recv(rank)
                comm.send(_seconds(now_s(), comm), rank)
        return ClockOffset(0.0, 0.0)
    trips = []
    for _ in range(ROUND_TRIPS):
        asked_s = now_s()
        comm.send(_seconds(asked_s, comm), 0)
        answer_s = comm.recv(0).item()
        trips.append((now_s() - asked_s, asked_s, answer_s))
    trip_s, asked_s, answer_s = min(trips)
    return ClockOffset(answer_s - (asked_s + trip_s / 2), trip_s / 2)


def _seconds(value: float, comm: Communicator) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=comm.device)
