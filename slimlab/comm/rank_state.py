"""Where a rank that is a thread stands: its turn, its random states, the collective it waits for.

Parts of slimlab.comm.world, which chapter 07 explains.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from slimlab.comm.calls import Call
from slimlab.comm.groups import Group
from slimlab.comm.mail import Letter
from slimlab.comm.report import Position


class RankStopped(BaseException):
    """End a rank because the run is over; not an Exception, so that no program catches it."""


class RandomState:
    """The states of torch's and Python's own random generators, for one rank to keep.

    numpy's are left out: saving them costs more than all the rest of a turn.
    """

    def __init__(self):
        self.torch_state, self.python_state = torch.get_rng_state(), random.getstate()

    def restore(self) -> None:
        """Put the states back as they were."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)


@dataclass
class RankState:
    """Where one rank stands.

    turn_came  wakes the rank's thread
    random     its random states while another rank runs
    call       what it waits in, if it waits
    awaited    what it waits for: that a message is there or was received, or a collective
    ready      whether it could go on
    num_met    how many collectives it has come to, by context
    finished   its program has returned
    thread     the thread that runs it
    num_stops  how often it was told that the run is over
    """

    turn_came: threading.Condition
    random: RandomState
    call: Call | None = None
    awaited: "Letter | Meeting | None" = None
    ready: Callable[[], bool] = lambda: True
    finished: bool = False
    num_met: Counter = field(default_factory=Counter)
    thread: threading.Thread | None = None
    num_stops: int = 0


@dataclass
class Meeting:
    """One collective call: who has come, with what, and what each gets once all are there.

    All by rank of the world.

    group     among whom
    calls     what each rank asks for
    lines     where each rank asked
    payloads  what each rank brings
    held      all have come, and there are results or an error
    results   what each rank gets
    error     what kept the results from being made
    """

    group: Group
    calls: dict[int, Call] = field(default_factory=dict)
    lines: dict[int, Position | None] = field(default_factory=dict)
    payloads: dict[int, object] = field(default_factory=dict)
    held: bool = False
    results: dict[int, object] = field(default_factory=dict)
    error: Exception | None = None

    def missing(self) -> list[int]:
        """List the ranks that have not come."""
        return [rank for rank in self.group.ranks if rank not in self.calls]
