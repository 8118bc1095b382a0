"""How ranks that torch.distributed connects compare their calls before a collective.

Chapter 07 uses it through slimlab.comm.distributed; slimlab.comm.agree says what is compared. gloo
carries the comparison, as messages of 16 bytes: in step k each rank tells the one 2^k ranks further
what it has heard, so that after ceil(log2 n) steps each has heard of all. On two cores this took
0.1 ms less than gloo's all_reduce, which hands every call to a thread. Data must not follow before
it is known to fit: where two ranks differ in size, gloo ends the process.

A collective that is only started must not wait for the comparison. A thread of its own compares it
and starts it when all ranks have come; what differs is said by the call that waits. Collectives
that follow wait for this thread, so that all are compared and started in the program's order.

Production programs compare on request (TORCH_DISTRIBUTED_DEBUG=DETAIL), or not at all.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from slimlab.comm.agree import Agreement, digests
from slimlab.comm.calls import Call, Progress
from slimlab.comm.counts import Counts
from slimlab.comm.gloo_messages import COMPARE_TAG, Port
from slimlab.comm.report import Position, frames_of, leavings, position_of
from slimlab.comm.standing import Standing
from slimlab.comm.stuck import unreceived
from slimlab.comm.torch_carriers import Carrier, Carriers

Started = TypeVar("Started")  # what waits for a call: one piece of work of torch's, or several


class Comparison:
    """The comparison of calls within one group.

    carriers  of the group
    port      of the group
    check     compare; else only meet waits for the others
    """

    def __init__(self, carriers: Carriers, port: Port, check: bool):
        self._carriers, self._port, self.on = carriers, port, check
        self._agreement = Agreement(self._smallest, port.texts)
        self._starter: ThreadPoolExecutor | None = None
        self._unequal: tuple[Call, Position | None] | None = None

    def check(self, call: Call) -> None:
        """Wait until every rank has come to a collective, and compare.

        call  of this rank

        Communicates: ceil(log2 n) messages of 16 bytes.
        Raises MismatchError, the same on every rank, if calls differ.
        """
        if not self.on:
            return
        if self._starter is not None:
            self._carriers.gloo.lookout.result(self._starter.submit(int))
            self._raise_if_unequal()
        self._agreement.check(call)

    def meet(self, call: Call) -> None:
        """Wait until every rank has come; compare if calls are compared.

        call  of this rank

        Communicates: ceil(log2 n) messages of 16 bytes.
        Raises as check does.
        """
        if self.on:
            self.check(call)
        else:
            self._smallest(torch.zeros(2, dtype=torch.int64, device="cpu"))

    def begin(self, call: Call, start: Callable[[], Started]) -> Callable[[], Started]:
        """Compare a call and start it, without waiting.

        call     of this rank
        start    hands the tensors to a backend
        returns  what waits until the call has been started, and returns what start returned; it
                 raises as check does

        Communicates: ceil(log2 n) messages of 16 bytes, and what start begins.
        """
        if not self.on:
            work = start()
            return lambda: work
        if self._starter is None:
            self._starter = ThreadPoolExecutor(1, "slimlab-starter")
        where = position_of(frames_of(sys._getframe()))
        future = self._starter.submit(self._compare_and_start, call, where, start)

        def started() -> Started:
            work = self._carriers.gloo.lookout.result(future)
            self._raise_if_unequal()
            return work

        return started

    def check_nothing_is_left(self, progress: Progress) -> None:
        """Compare what all ranks have begun and done, after all have finished.

        progress  of this rank

        Communicates: one message from each rank to each.
        Raises, the same on every rank, UnreceivedError for messages that nobody received,
        UnwaitedError for calls that were started and never waited for.
        """
        if not self.on:
            return
        mine = json.dumps([progress.counts.as_lists(), progress.unwaited()])
        everyones = [json.loads(text) for text in self._port.texts(mine)]
        standings = [
            Standing(counts=None if counts is None else Counts.from_lists(counts))
            for counts, _ in everyones
        ]
        error = leavings(unreceived(standings), [unwaited for _, unwaited in everyones])
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._starter is not None:
            self._starter.shutdown(wait=False)  # after a failure it may wait for long
            self._starter = None

    def _compare_and_start(
        self, call: Call, where: Position | None, start: Callable[[], Started]
    ) -> Started | None:
        if self._unequal is None:
            low, high = self._spread(digests(call), self._carriers.direct).tolist()
            if low == -high:
                return start()
            self._unequal = call, where
        return None

    def _raise_if_unequal(self) -> None:
        if self._unequal is not None:
            self._agreement.explain(*self._unequal)

    def _smallest(self, numbers: Tensor) -> Tensor:
        return self._spread(numbers, self._carriers.gloo)

    def _spread(self, numbers: Tensor, gloo: Carrier) -> Tensor:
        rank, size, step = self._port.rank, len(self._port.ranks), 1
        while step < size:
            heard = torch.empty_like(numbers)
            arriving = gloo.recv(heard, (rank - step) % size, COMPARE_TAG)
            leaving = gloo.send(numbers, (rank + step) % size, COMPARE_TAG)
            gloo.wait(arriving)
            gloo.wait(leaving)
            numbers, step = torch.minimum(numbers, heard), 2 * step
        return numbers
