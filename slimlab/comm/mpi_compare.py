"""What ranks over MPI compare: their calls before a collective, and at the end what is left over.

Chapter 07 uses it through slimlab.comm.mpi; slimlab.comm.agree says how calls are compared. Here is
what belongs to MPI: calls that were only started are compared while they are under way, and their
ranks hear of a difference when they wait. Importing this module starts MPI.

Production programs compare on request (TORCH_DISTRIBUTED_DEBUG=DETAIL), or not at all.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence

from mpi4py import MPI
from torch import Tensor

from slimlab.comm.agree import Agreement, digests
from slimlab.comm.calls import Call, Handle, short_group
from slimlab.comm.mpi_buffers import reduced
from slimlab.comm.mpi_transport import Transport
from slimlab.comm.report import frames_of, leavings, position_of


class Comparison:
    """The comparison of calls within one communicator.

    transport  of this rank
    control    communicator of MPI for it; it sends messages with tag 0
    check      compare; else every method returns at once
    """

    def __init__(self, transport: Transport, control: MPI.Comm, check: bool):
        self._transport, self._control, self._on = transport, control, check
        self._agreement = Agreement(self._smallest, self._texts)
        self._begun: deque[tuple] = deque()
        self._num_begun = 0

    def check(self, call: Call) -> None:
        """Wait until every rank has come to a collective, and compare.

        call  of this rank

        Raises MismatchError, the same on every rank, if calls differ.
        """
        if self._on:
            self.settle(self._num_begun)
            self._agreement.check(call)

    def begin(self, call: Call) -> int:
        """Begin to compare a call that is only started.

        call     of this rank
        returns  what settle takes
        """
        if self._on:
            numbers, where = digests(call), position_of(frames_of(sys._getframe()))
            self._begun.append((self._start(numbers), numbers, call, where))
            self._num_begun += 1
        return self._num_begun

    def start(
        self,
        comm: MPI.Comm,
        call: Call,
        name: str,
        args: tuple,
        deliver: Callable[[], Tensor],
    ) -> Handle:
        """Start a collective call, and its comparison.

        comm     the communicator of MPI
        call     of this rank
        name     of the form that waits: "Allreduce" and the like
        args     as mpi4py takes them
        deliver  returns the result, when MPI has it
        returns  a handle whose wait raises MismatchError, the same on every rank, if calls differ
        """
        agreed = self.begin(call)
        request = self._transport.start(comm, name, *args)

        def finish() -> Tensor:
            self.settle(agreed)
            self._transport.wait(request)
            return deliver()

        return Handle(finish)

    def settle(self, number: int) -> None:
        """Finish the comparison of a started call, and of those before it.

        number  what begin returned

        Raises MismatchError, the same on every rank, if calls differ.
        """
        while self._num_begun - len(self._begun) < number:
            self._transport.wait(self._begun[0][0])
            self._compare_first()

    def is_settled(self, number: int) -> bool:
        """Tell, without waiting, whether the comparison of a started call is finished.

        number  what begin returned

        Raises MismatchError, the same on every rank, if calls differ.
        """
        while self._begun and self._begun[0][0].Test():
            self._compare_first()
        return self._num_begun - len(self._begun) >= number

    def _compare_first(self) -> None:
        _, numbers, call, where = self._begun.popleft()
        low, high = numbers.tolist()
        if low != -high:
            self._agreement.explain(call, where)

    def _start(self, numbers: Tensor) -> MPI.Request:
        args = MPI.IN_PLACE, reduced(numbers), MPI.MIN
        return self._transport.start(self._control, "Allreduce", *args)

    def _smallest(self, numbers: Tensor) -> Tensor:
        self._transport.wait(self._start(numbers))
        return numbers

    def _texts(self, text: str) -> list[str]:
        # No collective: ranks that have begun to compare further calls are ahead in those.
        me, ranks = self._control.rank, range(self._control.size)
        sent = [self._control.isend(text, rank, tag=0) for rank in ranks if rank != me]
        texts = [text if rank == me else self._control.recv(source=rank, tag=0) for rank in ranks]
        MPI.Request.waitall(sent)
        return texts

    def check_nothing_is_left(self, group: tuple[int, ...] | None) -> None:
        """Look for messages and started calls that are left, after all ranks have finished.

        group  the ranks of the world that are to be looked at; None: all, and all groups

        Raises UnreceivedError, UnwaitedError, the same on every rank.
        """
        balance, unwaited = self._transport.balance, []
        if group is None:
            unwaited = self._transport.progress.unwaited()
        else:
            balance = Counter({key: n for key, n in balance.items() if key[0] == group})
        balances, unwaiteds = zip(*self._control.allgather((balance, unwaited)))
        error = leavings(_unreceived(balances), unwaiteds)
        if error is not None:
            raise error


def _unreceived(balances: Sequence[Counter]) -> list[str]:
    left: Counter[tuple] = Counter()
    for balance in balances:
        left.update(balance)
    lines = []
    for group, src, dst, tag in sorted(left, key=lambda key: (key[0] or (), *key[1:])):
        number = left[group, src, dst, tag]
        if number > 0:
            what = "one message" if number == 1 else f"{number:,} messages"
            within = "" if group is None else f" in group {short_group(group)}"
            lines.append(f"rank {src} to rank {dst}: {what} with tag {tag}{within}")
    return lines
