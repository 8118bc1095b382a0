"""Trace a run: the payload of every call, what crosses each link, and when.

    def program(comm, x):
        comm = TracedCommunicator(comm)
        with comm.label("sum"):
            ring_all_reduce(comm, x)
        return gather_trace(comm)

Two ledgers: the payload of every call stays in comm.ledger, as without a trace. What crosses links
stands in the events of messages between two ranks, also those inside of the collectives of
slimlab.comm.collectives, which are written with such messages. A collective of the runtime is one
event with a payload and no links: what MPI or NCCL moves inside, nobody sees from here.

Chapter 07 draws traces (slimlab.show.traffic). Production tracers (Kineto, Nsight Systems, Score-P)
write events into memory set apart beforehand, so that tracing takes less of the time it measures.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Call, Handle
from slimlab.comm.clocks import ClockOffset, align_clocks
from slimlab.comm.events import Event, Message, from_record, to_record
from slimlab.comm.trace_data import Trace
from slimlab.comm.wrapped import WrappedCommunicator, bytes_of, quiet_twin, wrapped_program
from slimlab.config import require


class TracedCommunicator(WrappedCommunicator):
    """A communicator that writes down every call that passes through it.

    It is one itself: programs and slimlab.comm.collectives run through it unchanged. Groups split
    from it are traced into the same trace. On a dialled network, dial first:
    TracedCommunicator(DialledCommunicator(comm, network)); the times are then the network's.

    comm  any communicator
    """

    def __init__(self, comm: Communicator, *, _recorder: "Recorder | None" = None):
        super().__init__(comm)
        self._recorder = _recorder or Recorder(self.ranks[self.rank], lambda: self.clock_s)
        self._path, self._num_splits = "", 0

    @property
    def events(self) -> list[Event]:
        """This rank's events so far, on its own clock, in the order in which the calls ended."""
        return self._recorder.events

    @contextmanager
    def label(self, text: str) -> Iterator[None]:
        """Name the calls inside of a with block, as pictures and files show them.

        text  a word or two; inside of another label it stands behind that one
        """
        self._recorder.labels.append(text)
        try:
            yield
        finally:
            self._recorder.labels.pop()

    def compute(self, seconds: float) -> None:
        """Let this rank compute for a while, see DialledCommunicator.compute; one event.

        seconds  at least 0

        Communicates: nothing.
        Raises InputError where no network was dialled.
        """
        with self._recorder.event("compute"):
            super().compute(seconds)

    def _around(self, comm):
        return TracedCommunicator(comm, _recorder=self._recorder)

    def _split(self, call, color, key):
        # The color tells the groups of one split apart, the number those of several.
        self._num_splits += 1
        group = super()._split(call, color, key)
        if group is not None:
            group._path = f"{self._path}/{self._num_splits}.{color}"
        return group

    def _pass_on(self, method: Callable, call: Call, *arguments):
        payload = next((one for one in arguments if isinstance(one, Tensor)), None)
        with self._recorder.event(call.name) as event:
            result = method(call, *arguments)
            payload = result if payload is None and isinstance(result, Tensor) else payload
            event["n_bytes"] = bytes_of(payload)
        return self._waited(result) if isinstance(result, Handle) else result

    def _send(self, call, tensor, dst, tag):
        with self._recorder.event("send", sent=self._leaving(tensor, dst, tag)):
            self._inner._send(call, tensor, dst, tag)

    def _isend(self, call, tensor, dst, tag):
        with self._recorder.event("isend", sent=self._leaving(tensor, dst, tag)):
            handle = self._inner._isend(call, tensor, dst, tag)
        return self._waited(handle)

    def _recv(self, call, src, tag, out):
        arriving = self._arriving(src, tag)
        with self._recorder.event("recv") as event:
            tensor = self._inner._recv(call, src, tag, out)
            event["received"] = arriving(tensor)
        return tensor

    def _irecv(self, call, src, tag, out):
        arriving = self._arriving(src, tag)
        with self._recorder.event("irecv"):
            handle = self._inner._irecv(call, src, tag, out)
        return self._waited(handle, arriving)

    def _sendrecv(self, call, tensor, dst, src, tag, out):
        leaving, arriving = self._leaving(tensor, dst, tag), self._arriving(src, tag)
        with self._recorder.event("sendrecv", sent=leaving) as event:
            received = self._inner._sendrecv(call, tensor, dst, src, tag, out)
            event["received"] = arriving(received)
        return received

    def _waited(self, handle: Handle, arriving: Callable | None = None) -> Handle:
        def finish() -> Tensor | None:
            with self._recorder.event("wait") as event:
                result = handle.wait()
                if arriving is not None:
                    event["received"] = arriving(result)
            return result

        return Handle(finish)

    def _leaving(self, tensor: Tensor, dst: int, tag: int) -> Message:
        return Message(self.ranks[dst], bytes_of(tensor), self._key(self.rank, dst, tag))

    def _arriving(self, src: int, tag: int) -> Callable[[Tensor], Message]:
        # Numbered when the receive is called for: messages match receives in that order.
        key = self._key(src, self.rank, tag)
        return lambda tensor: Message(self.ranks[src], bytes_of(tensor), key)

    def _key(self, src: int, dst: int, tag: int) -> str:
        link = f"{self._path}:{self.ranks[src]}>{self.ranks[dst]}:{tag}"
        self._recorder.num_messages[link] += 1
        return f"{link}:{self._recorder.num_messages[link]}"


class Recorder:
    """What one rank writes down, also for the groups that it belongs to.

    rank   of the world
    now_s  reads the rank's clock, in seconds
    """

    def __init__(self, rank: int, now_s: Callable[[], float]):
        self._rank, self._now_s = rank, now_s
        self.events: list[Event] = []
        self.labels: list[str] = []
        self.num_messages: Counter[str] = Counter()

    @contextmanager
    def event(self, call: str, sent: Message | None = None) -> Iterator[dict]:
        """Write down the call inside of a with block, unless it fails.

        call  name of the method
        sent  the message that it sends
        yields  what is known only at the end: n_bytes or received
        """
        label, late = " / ".join(self.labels), {}
        begin_s = self._now_s()
        yield late
        end_s = self._now_s()
        received = late.get("received")
        moved = sum(message.n_bytes for message in (sent, received) if message)
        n_bytes = late.get("n_bytes", moved)
        self.events.append(Event(self._rank, call, n_bytes, begin_s, end_s, label, sent, received))


def gather_trace(comm: TracedCommunicator) -> Trace | None:
    """Bring the events of all ranks together, on the clock of rank 0.

    comm     the traced communicator of the whole world, not one split from it
    returns  the trace on rank 0, None on the others

    Communicates: messages that align the clocks (slimlab.comm.clocks) and one gather of text, by
    ways of its own: nothing of it stands in a ledger or in the trace, and it takes no time on a
    dialled network.
    Raises InputError for a communicator that is not traced, or a group's.
    """
    whole = isinstance(comm, TracedCommunicator) and comm._group is None
    require(
        whole,
        "gather_trace: the traced communicator of all ranks",
        f"{comm!r}" + (" of a group" if isinstance(comm, TracedCommunicator) else ""),
        "write comm = TracedCommunicator(comm) first in the program, and gather_trace(comm) last",
    )
    twin = quiet_twin(comm, "gather_trace")
    offset = align_clocks(twin, lambda: comm.clock_s)
    own = {"events": [to_record(event) for event in comm.events], "clock": asdict(offset)}
    texts = _gather_texts(twin, json.dumps(own))
    if texts is None:
        return None
    parts = [json.loads(text) for text in texts]
    offsets = [ClockOffset(**part["clock"]) for part in parts]
    events = [
        from_record(record).shifted(offset.offset_s)
        for part, offset in zip(parts, offsets)
        for record in part["events"]
    ]
    start_s = min((event.begin_s for event in events), default=0.0)
    if not comm.has_virtual_clock:
        events = [event.shifted(-start_s) for event in events]
    return Trace(comm.world_size, tuple(events), tuple(offsets), comm.has_virtual_clock)


class Traced(NamedTuple):
    """What a traced program returns on every rank.

    result  what the program returned
    trace   of all ranks, on rank 0; None on the others
    """

    result: object
    trace: Trace | None


def traced(program: Callable) -> Callable:
    """Make a program that does the same and is traced: run_ranks(traced(program), 4)[0].trace.

    program  a function of a communicator and further arguments
    returns  a function of the same arguments, which returns Traced(result, trace)

    Raises InputError if program is no function.
    """
    return wrapped_program(_run_traced, program)


def _run_traced(program: Callable, comm: Communicator, *args) -> Traced:
    comm = TracedCommunicator(comm)
    result = program(comm, *args)
    return Traced(result, gather_trace(comm))


def _gather_texts(comm: Communicator, text: str) -> list[str] | None:
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(comm.device)
    sizes = comm.all_gather(torch.tensor([len(own)], device=comm.device)).tolist()
    joined = comm.gather(own, sizes=sizes)
    if joined is None:
        return None
    return [bytes(part.tolist()).decode() for part in joined.cpu().split(sizes)]
