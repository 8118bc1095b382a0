"""The trace of a run: what all ranks did, on one clock; counts per link and per rank; files.

slimlab.comm.trace collects it, slimlab.show.traffic draws it. Chapter 07 reads it: what a rank
waits for shows only when the ranks are seen side by side. Production viewers (Perfetto, Vampir,
Nsight Systems) open files of millions of events; this one is a list in memory.
"""

import json
import os
from dataclasses import dataclass

from torch import Tensor

from slimlab.comm.clocks import ClockOffset
from slimlab.comm.events import Event, link_matrix
from slimlab.comm.report import text_table
from slimlab.text.files import write_atomically

# Perfetto ties an arrow to a bar that is longer than nothing, and resolves nanoseconds.
LEAST_US = 0.001
DIGITS_US = 3


@dataclass(frozen=True)
class RankTotals:
    """What one rank did in all.

    rank               of the world
    num_calls          calls, waits of started ones not counted
    messages_sent      to other ranks, one by one
    bytes_sent         their payload
    messages_received  from other ranks, one by one
    bytes_received     their payload
    in_calls_s         seconds in calls and waits
    computed_s         seconds charged with compute
    """

    rank: int
    num_calls: int
    messages_sent: int
    bytes_sent: int
    messages_received: int
    bytes_received: int
    in_calls_s: float
    computed_s: float


@dataclass(frozen=True)
class Trace:
    """The events of all ranks.

    world_size  number of ranks
    events      each rank's in the order in which its calls ended, rank by rank; seconds on rank
                0's clock, from the begin of the first call or, if virtual, of the run
    offsets     how each rank's clock stood to that of rank 0
    virtual     the seconds were computed (slimlab.comm.network), not measured
    """

    world_size: int
    events: tuple[Event, ...]
    offsets: tuple[ClockOffset, ...]
    virtual: bool = False

    @property
    def messages(self) -> Tensor:
        """Messages from rank (row) to rank (column): (world_size, world_size) int64."""
        return link_matrix(self.events, self.world_size, "messages")

    @property
    def bytes(self) -> Tensor:
        """Bytes from rank (row) to rank (column): (world_size, world_size) int64."""
        return link_matrix(self.events, self.world_size, "bytes")

    @property
    def end_s(self) -> float:
        """When the last call ended, in seconds."""
        return max((event.end_s for event in self.events), default=0.0)

    @property
    def uncertainty_s(self) -> float:
        """How far an event may be misplaced against one of rank 0, in seconds, at most."""
        return max(offset.uncertainty_s for offset in self.offsets)

    def of_rank(self, rank: int) -> list[Event]:
        """List the events of one rank.

        rank  of the world
        """
        return [event for event in self.events if event.rank == rank]

    def totals(self) -> list[RankTotals]:
        """Add up what each rank did, in rank order."""
        found = []
        for rank in range(self.world_size):
            events = self.of_rank(rank)
            sent = [event.sent.n_bytes for event in events if event.sent]
            received = [event.received.n_bytes for event in events if event.received]
            computed_s = sum(event.seconds for event in events if event.call == "compute")
            found.append(
                RankTotals(
                    rank,
                    sum(event.call not in ("wait", "compute") for event in events),
                    len(sent),
                    sum(sent),
                    len(received),
                    sum(received),
                    sum(event.seconds for event in events) - computed_s,
                    computed_s,
                )
            )
        return found

    def table(self) -> str:
        """Tabulate what each rank did."""
        headers = ("rank", "calls", "sent", "bytes sent", "received", "bytes received", "in calls")
        rows = [
            (
                one.rank,
                one.num_calls,
                one.messages_sent,
                f"{one.bytes_sent:,}",
                one.messages_received,
                f"{one.bytes_received:,}",
                f"{one.in_calls_s * 1e3:.3f} ms",
            )
            for one in self.totals()
        ]
        return text_table(headers, rows)

    def to_chrome(self, path: str | os.PathLike) -> None:
        """Write the trace in Chrome's format, for ui.perfetto.dev or chrome://tracing.

        path  the file, usually *.json; an old one stays until the new one is whole

        Raises InputError if it cannot be written.
        """
        note = {
            "clock": "virtual" if self.virtual else "measured",
            "uncertainty_us": [offset.uncertainty_s * 1e6 for offset in self.offsets],
        }
        data = {"traceEvents": self.chrome_events(), "displayTimeUnit": "ns", "otherData": note}
        write_atomically(path, json.dumps(data).encode())

    def chrome_events(self) -> list[dict]:
        """Return what to_chrome writes: names of ranks, a bar per event, an arrow per message."""
        written = []
        for rank in range(self.world_size):
            for what, value in (("name", f"rank {rank}"), ("sort_index", rank)):
                key = "name" if what == "name" else "sort_index"
                about = {"name": f"process_{what}", "ph": "M", "pid": rank, "tid": 0, "ts": 0}
                written.append({**about, "args": {key: value}})
            end_us = 0.0
            for event in self.of_rank(rank):
                begin_us = max(round(event.begin_s * 1e6, DIGITS_US), end_us)
                end_us = max(round(event.end_s * 1e6, DIGITS_US), begin_us + LEAST_US)
                written += chrome_bar(event, begin_us, round(end_us, DIGITS_US))
        return written


def chrome_bar(event: Event, begin_us: float, end_us: float) -> list[dict]:
    """Return one event in Chrome's format, and the ends of its messages' arrows.

    event     what happened
    begin_us  where its bar begins, in microseconds
    end_us    where it ends
    """
    where = {"pid": event.rank, "tid": 0}
    args = {"bytes": event.n_bytes}
    args |= {"peer": event.peer} if event.peer is not None else {}
    args |= {"label": event.label} if event.label else {}
    length_us = round(end_us - begin_us, DIGITS_US)
    bar = {"name": event.call, "cat": "comm", "ph": "X", "ts": begin_us, "dur": length_us}
    written = [{**bar, **where, "args": args}]
    arrow = {"name": "message", "cat": "message"}
    if event.sent:
        start = {"ph": "s", "id": event.sent.key, "ts": begin_us}
        written.append({**arrow, **start, **where})
    if event.received:
        # Just before the end: a time at the end itself belongs to no bar.
        finish = {"ph": "f", "bp": "e", "id": event.received.key}
        ts = max(begin_us, round(end_us - LEAST_US, DIGITS_US))
        written.append({**arrow, **finish, "ts": ts, **where})
    return written
