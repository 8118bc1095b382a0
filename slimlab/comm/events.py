"""What a trace is made of: one event per call of a rank, and the messages that belong to it.

Parts of slimlab.comm.trace, which chapter 07 explains. Production formats (OTF2, Kineto) have the
same records: who, what, from when to when, and which message connects two of them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One end of a message between two ranks.

    peer     the rank of the world at the other end
    n_bytes  of the payload
    key      the same at both ends, and of no other message: group, ranks, tag, and which one it is
    """

    peer: int
    n_bytes: int
    key: str


@dataclass(frozen=True)
class Event:
    """One call of one rank.

    rank      of the world
    call      name of the method; "wait" for the wait of a started call, "compute" for time charged
    n_bytes   its payload, as the ledger counts it; what is waited for counts where it was started,
              a message received where it arrives
    begin_s   when the rank went in, in seconds of rank 0's clock
    end_s     when it came out
    label     what the program called it, see TracedCommunicator.label; "" if nothing
    sent      the message that it sent, if any
    received  the message that it received, if any
    """

    rank: int
    call: str
    n_bytes: int
    begin_s: float
    end_s: float
    label: str = ""
    sent: Message | None = None
    received: Message | None = None

    @property
    def peer(self) -> int | None:
        """The rank of the world it sent to or, if it sent nothing, received from."""
        message = self.sent or self.received
        return message.peer if message else None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s

    def shifted(self, offset_s: float) -> "Event":
        """Return the same event on another clock.

        offset_s  seconds to add
        """
        return replace(self, begin_s=self.begin_s + offset_s, end_s=self.end_s + offset_s)


def to_record(event: Event) -> dict:
    """Turn an event into what JSON can hold.

    event  any
    """
    return asdict(event)


def from_record(record: dict) -> Event:
    """Turn what to_record made back into an event.

    record  what to_record returned, perhaps by way of JSON
    """
    ends = {
        name: Message(**record[name]) if record[name] else None for name in ("sent", "received")
    }
    return Event(**(record | ends))


def link_matrix(events: Sequence[Event], world_size: int, counted: str) -> Tensor:
    """Add up what was sent from rank to rank.

    events      of all ranks
    world_size  number of ranks
    counted     "messages" or "bytes"
    returns     (world_size, world_size) int64: row src, column dst
    """
    matrix = torch.zeros(world_size, world_size, dtype=torch.int64, device="cpu")
    for event in events:
        if event.sent:
            matrix[event.rank, event.sent.peer] += event.sent.n_bytes if counted == "bytes" else 1
    return matrix


def steps_of(events: Sequence[Event]) -> list[tuple[int, Event]]:
    """Find in which step each message travels, if nothing but messages took any time.

    In a step a rank sends at most one message and receives at most one. What it sends after it has
    received travels in a later step; of messages that could arrive in the same step, the one that
    the receiver asks for first does.

    events   of all ranks, each rank's in the order of its calls
    returns  (step from 0, event that sends), the earliest first, in rank order within a step
    """
    ends = {event.rank: deque() for event in events}
    asked_for = {}
    for event in events:
        ends[event.rank].extend((event, leaves) for leaves in (True, False) if _end(event, leaves))
        if event.received:
            asked_for[event.received.key] = len(asked_for)
    next_step, arrived, taken, found = dict.fromkeys(ends, 0), {}, set(), []

    def urgency(rank: int) -> tuple[int, int, int]:
        key = ends[rank][0][0].sent.key
        return next_step[rank], asked_for.get(key, len(asked_for)), rank

    while True:
        for rank, queue in ends.items():
            while queue and not queue[0][1] and queue[0][0].received.key in arrived:
                key = queue.popleft()[0].received.key
                next_step[rank] = max(next_step[rank], arrived[key])
        ready = [rank for rank, queue in ends.items() if queue and queue[0][1]]
        if not ready:
            # What is left receives messages from outside of the trace.
            return sorted(found, key=lambda one: (one[0], one[1].rank))
        rank = min(ready, key=urgency)
        event, step = ends[rank].popleft()[0], next_step[rank]
        while (event.sent.peer, step) in taken:
            step += 1
        taken.add((event.sent.peer, step))
        found.append((step, event))
        next_step[rank] = arrived[event.sent.key] = step + 1


def _end(event: Event, leaves: bool) -> Message | None:
    return event.sent if leaves else event.received
