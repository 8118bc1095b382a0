"""A communicator around another one, which does the work: how a run is traced or slowed down.

slimlab.comm.trace writes down what passes, slimlab.comm.network makes it take time. A program takes
either for the communicator that it is. Chapter 07 uses both. Production tools wrap from below: PMPI
puts a library between a program and MPI, Kineto hooks into NCCL.
"""

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, update_wrapper

from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Call
from slimlab.comm.ledger import PayloadLedger
from slimlab.config import require


class WrappedCommunicator(Communicator):
    """A communicator that passes every call on.

    It shares ranks, ledger and progress with the one inside, so that a call stands in the ledger
    once, however many wraps are around.

    comm  what does the work
    """

    def __init__(self, comm: Communicator):
        super().__init__(
            comm.rank,
            comm.world_size,
            ranks=comm._group,
            ledger=comm.ledger,
            progress=comm.progress,
        )
        self.backend, self.device = comm.backend, comm.device
        self._inner = comm

    @property
    def clock_s(self) -> float:
        """This rank's time in seconds; from where it is counted, is the runtime's business."""
        return self._inner.clock_s if self._is_wrapped else time.perf_counter()

    @property
    def has_virtual_clock(self) -> bool:
        """Whether the time is computed (slimlab.comm.network) and not measured."""
        return self._is_wrapped and self._inner.has_virtual_clock

    def label(self, text: str) -> AbstractContextManager:
        """Name the calls inside of a with block, for a trace (slimlab.comm.trace) if there is one.

        text  a word or two
        """
        return self._inner.label(text) if self._is_wrapped else nullcontext()

    def compute(self, seconds: float) -> None:
        """Let this rank compute for a while, as a dialled network counts time.

        seconds  at least 0

        Communicates: nothing.
        Raises InputError where no network was dialled.
        """
        require(
            self._is_wrapped,
            "compute: a rank on a dialled network, where time can be charged",
            f"a {type(self._inner).__name__}",
            "wrap the communicator: DialledCommunicator(comm, Network(...))",
        )
        self._inner.compute(seconds)

    @property
    def _is_wrapped(self) -> bool:
        return isinstance(self._inner, WrappedCommunicator)

    @abstractmethod
    def _around(self, comm: Communicator) -> Communicator:
        """Wrap a group's communicator as this one is wrapped."""

    def _pass_on(self, method: Callable, call: Call, *arguments):
        return method(call, *arguments)

    def _send(self, call, tensor, dst, tag):
        return self._inner._send(call, tensor, dst, tag)

    def _recv(self, call, src, tag, out):
        return self._inner._recv(call, src, tag, out)

    def _isend(self, call, tensor, dst, tag):
        return self._inner._isend(call, tensor, dst, tag)

    def _irecv(self, call, src, tag, out):
        return self._inner._irecv(call, src, tag, out)

    def _sendrecv(self, call, tensor, dst, src, tag, out):
        return self._inner._sendrecv(call, tensor, dst, src, tag, out)

    def _barrier(self, call):
        return self._pass_on(self._inner._barrier, call)

    def _broadcast(self, call, tensor, src, out):
        return self._pass_on(self._inner._broadcast, call, tensor, src, out)

    def _reduce(self, call, tensor, dst, op, out):
        return self._pass_on(self._inner._reduce, call, tensor, dst, op, out)

    def _all_reduce(self, call, tensor, op, out):
        return self._pass_on(self._inner._all_reduce, call, tensor, op, out)

    def _all_reduce_async(self, call, tensor, op, out):
        return self._pass_on(self._inner._all_reduce_async, call, tensor, op, out)

    def _reduce_scatter(self, call, tensor, op, sizes, out):
        return self._pass_on(self._inner._reduce_scatter, call, tensor, op, sizes, out)

    def _all_gather(self, call, tensor, sizes, out):
        return self._pass_on(self._inner._all_gather, call, tensor, sizes, out)

    def _all_gather_async(self, call, tensor, sizes, out):
        return self._pass_on(self._inner._all_gather_async, call, tensor, sizes, out)

    def _gather(self, call, tensor, dst, sizes, out):
        return self._pass_on(self._inner._gather, call, tensor, dst, sizes, out)

    def _scatter(self, call, tensor, src, sizes, out):
        return self._pass_on(self._inner._scatter, call, tensor, src, sizes, out)

    def _all_to_all(self, call, tensor, send_sizes, recv_sizes, out):
        return self._pass_on(self._inner._all_to_all, call, tensor, send_sizes, recv_sizes, out)

    def _split(self, call, color, key):
        group = self._pass_on(self._inner._split, call, color, key)
        return None if group is None else self._around(group)


def runtime_of(comm: Communicator) -> Communicator:
    """Return the runtime's communicator, without what is wrapped around it.

    comm  any
    """
    while isinstance(comm, WrappedCommunicator):
        comm = comm._inner
    return comm


def quiet_twin(comm: Communicator, purpose: str) -> Communicator:
    """Make a communicator among the same ranks whose messages mix with no others.

    comm     any
    purpose  what it is for, as tables show it if a rank does not come
    returns  the runtime's own, unwrapped, with a ledger of its own: what it moves stands in none
             that a program sees

    Communicates: one split.
    """
    call = Call(purpose, group=comm._group)
    with comm.progress.inside(call):
        twin = runtime_of(comm)._split(call, 0, comm.rank)
    twin.ledger = PayloadLedger()
    return twin


def wrapped_program(run: Callable, program: Callable, *options) -> Callable:
    """Make a program that runs another one inside of a wrapped communicator.

    run      called as run(program, *options, comm, *args)
    program  a function of a communicator and args
    options  what run needs besides
    returns  a function of a communicator and the same args

    Raises InputError if program is no function.
    """
    require(
        callable(program),
        "program: a function whose first argument is a communicator",
        f"program = {program!r}",
        "give the function itself, not the result of a call",
    )
    return update_wrapper(partial(run, program, *options), program)


def bytes_of(tensor: Tensor | None) -> int:
    """Return the payload of a tensor, in bytes.

    tensor  any; None counts 0
    """
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
