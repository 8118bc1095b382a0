"""A network that you can dial: every message takes the time that you say.

On threads, each rank has a clock that is computed: a hundred ranks on a network of a data centre,
or of a slow phone line, run in the time that the messages themselves need, and the same run gives
the same seconds every time. On ranks that are processes, messages are held back until they would
have come, and the clock is the machine's.

The model, for a message of n bytes over a wire of latency l, overhead o and bandwidth b:

* Each rank has one port with two lanes, one out and one in, that do not hinder each other. A lane
  carries one message at a time, and is busy with it for o + n / b.
* It leaves when src has called and src's lane out is free; l later it is at dst.
* There it comes in as soon as dst's lane in is free for o + n / b, and is there when that ends.
* send returns when the message has left the lane, isend at once, its wait as send does. recv
  returns when the message is there, or at once if it was there before.

So one message alone takes l + o + n / b: the alpha-beta model of slimlab.plan, with alpha = l + o
and beta = 1 / b. Whether alpha is latency or overhead shows only where a rank has several messages
on the way: latencies pass at the same time, overheads one after the other. The steps of textbooks,
of which each takes alpha + beta n, are met exactly if all of alpha is overhead. LogGP (Alexandrov
et al. 1995, SPAA) tells the two apart in the same way.

Receives fill the lane in the order in which the program makes them. Computing takes the time that a
program charges with comm.compute(seconds), no more.

Chapter 07 dials. Real networks share wires between ranks, lose packets, and are busy with others.
"""

import time
from collections import deque
from collections.abc import Callable
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Call, Handle
from slimlab.comm.clocks import VirtualClock, WallClock, align_clocks
from slimlab.comm.collectives import (
    binomial_broadcast,
    binomial_reduce,
    pairwise_all_to_all,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
)
from slimlab.comm.collectives_direct import (
    direct_gather,
    direct_scatter,
    dissemination_barrier,
)
from slimlab.comm.links import Network, Wire
from slimlab.comm.ports import Port, SentStamps, SharedStamps
from slimlab.comm.wrapped import WrappedCommunicator, bytes_of, quiet_twin, wrapped_program
from slimlab.config import check_number, require


class DialledCommunicator(WrappedCommunicator):
    """A communicator whose messages take the time that a network says.

    The collectives are carried out by those of slimlab.comm.collectives, by rings and trees, and
    in the clearest way where there is none (gather, scatter, barrier): so their time is known.
    Sums are then added in the order of the ring. Of an asynchronous call the messages travel
    while the rank computes; where the clock is the machine's, they wait until it is waited for.
    The ledger holds what it would hold without.

    comm     a runtime's communicator; wrap the result, not this, in a TracedCommunicator
    network  the same on every rank

    Communicates: where ranks are processes, a split and what aligns their clocks.
    """

    def __init__(
        self,
        comm: Communicator,
        network: Network,
        *,
        _parent: "DialledCommunicator | None" = None,
    ):
        require(
            not isinstance(comm, WrappedCommunicator),
            "DialledCommunicator: the communicator of a runtime",
            f"a {type(comm).__name__}",
            "dial first, then trace: TracedCommunicator(DialledCommunicator(comm, network))",
        )
        super().__init__(comm)
        self.network = network
        in_threads = comm.backend == "threads"
        self._stamps = SharedStamps(comm) if in_threads else SentStamps(comm)
        if _parent is None:
            network.check(comm.world_size)
            self._port = Port()
            self._clock = VirtualClock() if in_threads else _common_clock(comm)
        else:
            self._port, self._clock = _parent._port, _parent._clock
        self._carrier: DialledCommunicator | None = None
        self._pending: deque[Handle] = deque()
        self._engine_free_s = 0.0

    @property
    def clock_s(self) -> float:
        """This rank's time in seconds, from 0 at the start."""
        return self._clock.now_s()

    @property
    def has_virtual_clock(self) -> bool:
        """Whether the time is computed, as on threads, and not measured."""
        return isinstance(self._clock, VirtualClock)

    def compute(self, seconds: float) -> None:
        """Let this rank compute for a while: its clock moves, or where it is real, it sleeps.

        seconds  at least 0

        Communicates: nothing.
        Raises InputError for a negative number.
        """
        check_number("seconds", seconds, float, 0.0, inf)
        self._clock.advance_to(self._clock.now_s() + seconds)

    def _around(self, comm):
        return DialledCommunicator(comm, self.network, _parent=self)

    def _wire(self, src: int, dst: int) -> Wire:
        return self.network.wire(self.ranks[src], self.ranks[dst])

    def _send(self, call, tensor, dst, tag):
        self._isend(call, tensor, dst, tag).wait()

    def _isend(self, call, tensor, dst, tag):
        busy_s = self._wire(self.rank, dst).busy_s(bytes_of(tensor))
        leaves_s = self._port.outgoing.take(self._clock.now_s(), busy_s)
        stamp = self._stamps.send(leaves_s, dst, tag)
        handle, clock = self._inner._isend(call, tensor, dst, tag), self._clock

        def finish() -> None:
            stamp.wait()
            handle.wait()
            clock.advance_to(leaves_s + busy_s)

        return Handle(finish)

    def _recv(self, call, src, tag, out):
        return self._irecv(call, src, tag, out).wait()

    def _irecv(self, call, src, tag, out):
        stamp, clock = self._stamps.recv(src, tag), self._clock
        handle, wire = self._inner._irecv(call, src, tag, out), self._wire(src, self.rank)

        def finish() -> Tensor:
            tensor = handle.wait()
            busy_s = wire.busy_s(bytes_of(tensor))
            begins_s = self._port.incoming.take(stamp() + wire.latency_s, busy_s)
            clock.advance_to(begins_s + busy_s)
            return tensor

        return Handle(finish)

    def _sendrecv(self, call, tensor, dst, src, tag, out):
        sent = self._isend(call, tensor, dst, tag)
        received = self._recv(call, src, tag, out)
        sent.wait()
        return received

    def _barrier(self, call):
        self._carry(call, dissemination_barrier)

    def _broadcast(self, call, tensor, src, out):
        return self._carry(call, binomial_broadcast, tensor, src, out=out)

    def _reduce(self, call, tensor, dst, op, out):
        return self._carry(call, binomial_reduce, tensor, dst, op, out=out)

    def _all_reduce(self, call, tensor, op, out):
        return self._carry(call, ring_all_reduce, tensor, op, out=out)

    def _all_reduce_async(self, call, tensor, op, out):
        return self._carry_later(call, ring_all_reduce, tensor, op, out=out)

    def _reduce_scatter(self, call, tensor, op, sizes, out):
        return self._carry(call, ring_reduce_scatter, tensor, op, sizes=sizes, out=out)

    def _all_gather(self, call, tensor, sizes, out):
        return self._carry(call, ring_all_gather, tensor, sizes=sizes, out=out)

    def _all_gather_async(self, call, tensor, sizes, out):
        return self._carry_later(call, ring_all_gather, tensor, sizes=sizes, out=out)

    def _gather(self, call, tensor, dst, sizes, out):
        return self._carry(call, direct_gather, tensor, dst, out=out)

    def _scatter(self, call, tensor, src, sizes, out):
        return self._carry(call, direct_scatter, tensor, src, sizes=sizes, out=out)

    def _all_to_all(self, call, tensor, send_sizes, recv_sizes, out):
        sizes = {"send_sizes": send_sizes, "recv_sizes": recv_sizes}
        return self._carry(call, pairwise_all_to_all, tensor, **sizes, out=out)

    def _carry_later(self, call: Call, algorithm: Callable, *arguments, **options) -> Handle:
        begun_s = self._clock.now_s()

        def finish() -> Tensor:
            return self._carry(call, algorithm, *arguments, _begun=(handle, begun_s), **options)

        handle = Handle(finish)
        self._pending.append(handle)
        return handle

    def _carry(
        self,
        call: Call,
        algorithm: Callable,
        *arguments,
        _begun: tuple[Handle, float] | None = None,
        **options,
    ):
        """Carry out a collective with messages of its own, apart from those of the program.

        _begun  of an asynchronous one, its handle and when it began
        """
        handle, begun_s = _begun or (None, self._clock.now_s())
        # Collectives run in the order in which they were begun, which is the same on every rank.
        while self._pending and self._pending[0] is not handle:
            self._pending[0].wait()
        if handle is not None:
            self._pending.popleft()
        # The runtime's barrier compares the calls of the ranks; it takes no time on virtual clocks.
        self._inner._barrier(call)
        if self._carrier is None:
            self._carrier = DialledCommunicator(
                quiet_twin(self._inner, "dialled collective"), self.network, _parent=self
            )
        if not self.has_virtual_clock:
            return algorithm(self._carrier, *arguments, **options)
        # What travels while the rank computes has a clock of its own until it is waited for.
        clock = VirtualClock(max(begun_s, self._engine_free_s))
        self._carrier._clock = clock
        result = algorithm(self._carrier, *arguments, **options)
        self._engine_free_s = clock.now_s()
        self._clock.advance_to(clock.now_s())
        return result


def _common_clock(comm: Communicator) -> WallClock:
    """Make a clock that shows 0 at the same moment on every rank."""
    twin = quiet_twin(comm, "common clock")
    offset_s = align_clocks(twin, time.perf_counter).offset_s
    now = torch.tensor(time.perf_counter(), dtype=torch.float64, device=comm.device)
    return WallClock(twin.broadcast(now).item() - offset_s)


class Timed(NamedTuple):
    """What a program on a dialled network returns on every rank.

    result   what the program returned
    clock_s  when it did, in seconds from its start: virtual seconds on threads, else measured ones
    """

    result: object
    clock_s: float


def dialled(program: Callable, network: Network) -> Callable:
    """Make a program that does the same on a dialled network.

        results = run_ranks(dialled(program, Network(50e-6, 1e9)), 64)
        print(max(one.clock_s for one in results))

    program  a function of a communicator and further arguments
    network  the network it is to run on
    returns  a function of the same arguments, which returns Timed(result, clock_s)

    Raises InputError if program is no function, or network no Network.
    """
    require(
        isinstance(network, Network),
        "network: a Network",
        f"network = {network!r}",
        "write dialled(program, Network(50e-6, 1e9))",
    )
    return wrapped_program(_run_dialled, program, network)


def _run_dialled(program: Callable, network: Network, comm: Communicator, *args) -> Timed:
    comm = DialledCommunicator(comm, network)
    result = program(comm, *args)
    return Timed(result, comm.clock_s)
