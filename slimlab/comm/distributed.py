"""Ranks that torch.distributed connects: gloo between processors, NCCL between GPUs.

Chapter 07 uses it. Tensors in the host's memory travel over gloo, those on a GPU over NCCL, one GPU
for each rank; where the runtime is gloo alone, and in messages between two ranks, tensors of a GPU
go through the host's memory. What recv and scatter make lies on the communicator's device. What
torch leaves out is made up for:

    int16              gloo and NCCL do not know it: combined as int32, moved as bytes
    mean               a sum, divided afterwards, in the dtype of the tensors
    all_gather         with gloo one broadcast per rank, which also takes uneven parts
    reduce_scatter     gloo's is a whole all_reduce, and uneven parts nobody takes: here parts are
                       exchanged, which moves half as much, and combined in the order of the ranks
    gather, scatter    messages

Everything is moved as bytes unless it is combined. Sums of all_reduce and reduce are made in an
order of the backend's, so they may differ in the last bits from those on threads; a max or min of
NaN may be either. Every call has a time limit. The ranks compare their calls before a collective
over gloo, also where NCCL carries the tensors.

Production programs call torch.distributed itself and leave the comparison out.
"""

import json
from functools import partial
from itertools import count

import torch.distributed as dist

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Handle, check_out
from slimlab.comm.gloo_messages import GATHER_TAG, SCATTER_TAG, Port
from slimlab.comm.groups import Group, check_exchange, groups_of
from slimlab.comm.reductions import reduce_in_rank_order
from slimlab.comm.torch_carriers import Carriers, on_its_stream
from slimlab.comm.torch_compare import Comparison
from slimlab.comm.torch_links import Link, connect_world
from slimlab.comm.torch_lookout import Lookout
from slimlab.comm.torch_memory import copy_of, delivered, plain, reduced_dtype, space_for
from slimlab.comm.wire import as_bytes


class TorchCommunicator(Communicator):
    """The communicator of a rank that torch.distributed connects to the others.

    link    how this rank reaches them
    check   compare the ranks' calls before each collective
    parent  the communicator that was split
    ranks   of the world, if this came from split
    """

    def __init__(
        self,
        link: Link,
        *,
        check: bool = True,
        parent: "TorchCommunicator | None" = None,
        ranks: tuple[int, ...] | None = None,
    ):
        shared = {} if parent is None else {"ledger": parent.ledger, "progress": parent.progress}
        super().__init__(link.rank, link.world_size, ranks=ranks, **shared)
        self.backend = "gloo" if link.nccl is None else "nccl"
        self.device = link.device
        self._lookout = Lookout() if parent is None else parent._lookout
        self._carriers = Carriers(link, self.ranks[link.rank], self.progress, self._lookout)
        self._port = Port(self._carriers, link.rank, self.ranks, link.device)
        self._comparison = Comparison(self._carriers, self._port, check)
        self._groups: list[TorchCommunicator] = []
        self._num_splits, self._open = 0, True

    def close(self) -> None:
        """Wait until every rank has finished, and free what this communicator and its groups hold.

        Communicates: one agreement per group that all have finished, and what is left of messages.
        Raises, if the ranks are compared, MismatchError if one has skipped a collective,
        UnreceivedError for messages that nobody received, UnwaitedError for calls that were started
        and never waited for.
        """
        if not self._open:
            return
        try:
            self._finish()
            if self._group is None:
                self._comparison.check_nothing_is_left(self.progress)
        finally:
            self._free()
        self._let_go()

    def _send(self, call, tensor, dst, tag):
        self._port.send(tensor, dst, tag)

    def _recv(self, call, src, tag, out):
        return self._port.recv(src, tag, out)

    def _isend(self, call, tensor, dst, tag):
        return self._port.isend(tensor, dst, tag)

    def _irecv(self, call, src, tag, out):
        return Handle(self._port.irecv(src, tag, out).finish)

    def _sendrecv(self, call, tensor, dst, src, tag, out):
        sent = self._port.isend(tensor, dst, tag)
        received = self._port.recv(src, tag, out)
        sent.wait()
        return received

    def _barrier(self, call):
        self._comparison.meet(call)

    def _broadcast(self, call, tensor, src, out):
        self._comparison.check(call)
        whole = copy_of(tensor, out) if self.rank == src else space_for(tensor, tensor.shape, out)
        near = self._carriers.near(whole)
        carrier = self._carriers.of(near)
        carrier.wait(carrier.broadcast(as_bytes(near), src))
        return delivered(near, whole, out)

    def _reduce(self, call, tensor, dst, op, out):
        dtype = reduced_dtype(tensor.dtype)
        self._comparison.check(call)
        total = copy_of(tensor, out if self.rank == dst else None)
        work = self._carriers.near(total).to(dtype)
        carrier = self._carriers.of(work)
        carrier.wait(carrier.reduce(work, dst, op))
        return self._combined(work, total, op, out) if self.rank == dst else None

    def _all_reduce(self, call, tensor, op, out):
        dtype = reduced_dtype(tensor.dtype)
        self._comparison.check(call)
        total = copy_of(tensor, out)
        work = self._carriers.near(total).to(dtype)
        carrier = self._carriers.of(work)
        carrier.wait(carrier.all_reduce(work, op))
        return self._combined(work, total, op, out)

    def _all_reduce_async(self, call, tensor, op, out):
        dtype = reduced_dtype(tensor.dtype)
        total = copy_of(tensor, out)
        work = self._carriers.near(total).to(dtype)
        carrier = self._carriers.of(work)
        start = on_its_stream(work, partial(carrier.all_reduce, work, op))
        started = self._comparison.begin(call, start)

        def finish():
            carrier.wait(started())
            return self._combined(work, total, op, out)

        return Handle(finish)

    def _reduce_scatter(self, call, tensor, op, sizes, out):
        dtype = reduced_dtype(tensor.dtype)
        self._comparison.check(call)
        mine, more = sizes[self.rank], tensor.shape[1:]
        whole = self._carriers.near(plain(tensor))
        if whole.is_cuda and dtype == whole.dtype and len(set(sizes)) == 1:
            part, nccl = space_for(tensor, (mine, *more), out), self._carriers.nccl
            nccl.wait(nccl.reduce_scatter(part, whole, op))
            return self._combined(part, part, op, out)
        parts = self._carriers.exchange(whole, sizes, [mine] * self.world_size, None)
        parts = parts.view(self.world_size, mine, *more)
        total = reduce_in_rank_order(parts, op, may_change=True)
        return delivered(total, space_for(tensor, (mine, *more), out), out)

    def _all_gather(self, call, tensor, sizes, out):
        self._comparison.check(call)
        start, finish = self._gathering(tensor, sizes, out)
        return finish(start())

    def _all_gather_async(self, call, tensor, sizes, out):
        start, finish = self._gathering(tensor, sizes, out)
        started = self._comparison.begin(call, start)
        return Handle(lambda: finish(started()))

    def _gather(self, call, tensor, dst, sizes, out):
        self._comparison.check(call)
        if self.rank != dst:
            self._port.send(tensor, dst, GATHER_TAG)
            return None
        whole = space_for(tensor, (sum(sizes), *tensor.shape[1:]), out)
        parts = whole.split(sizes)
        incoming = [
            self._port.irecv(src, GATHER_TAG, part) for src, part in enumerate(parts) if src != dst
        ]
        parts[dst].copy_(tensor)
        for one in incoming:
            one.finish()
        return whole if out is None else out

    def _scatter(self, call, tensor, src, sizes, out):
        self._comparison.check(call)
        if self.rank == src:
            parts = tensor.split(sizes)
            others = [rank for rank in range(self.world_size) if rank != src]
            sent = [self._port.isend(parts[rank], rank, SCATTER_TAG) for rank in others]
            part = copy_of(parts[src], out)
            for handle in sent:
                handle.wait()
            return part if out is None else out
        part = self._port.recv(src, SCATTER_TAG, None, None if out is None else out.device)
        check_out(call.name, out, part.shape, part)
        return part if out is None else delivered(part, out.detach(), out)

    def _all_to_all(self, call, tensor, send_sizes, recv_sizes, out):
        self._comparison.check(call)
        if self._comparison.on and call.arguments.endswith("uneven"):
            texts = self._port.texts(json.dumps([send_sizes, recv_sizes]))
            check_exchange([json.loads(text) for text in texts])
        return self._carriers.exchange(tensor, send_sizes, recv_sizes, out)

    def _split(self, call, color, key):
        self._comparison.check(call)
        wishes = [json.loads(text) for text in self._port.texts(json.dumps([color, key]))]
        numbers = count()
        group = groups_of(wishes, self.ranks, lambda one: Group(next(numbers), one))[self.rank]
        self._num_splits += 1
        if group is None:
            return None
        link = self._carriers.link.to_group(
            f"{self._num_splits}.{group.context}",
            group.ranks.index(self.ranks[self.rank]),
            len(group.ranks),
        )
        self._groups.append(
            TorchCommunicator(link, check=self._comparison.on, parent=self, ranks=group.ranks)
        )
        return self._groups[-1]

    def _gathering(self, tensor, sizes, out):
        whole = space_for(tensor, (sum(sizes), *tensor.shape[1:]), out)
        near = self._carriers.near(whole)
        near.split(sizes)[self.rank].copy_(tensor)

        def finish(works):
            for work in works:
                self._carriers.of(near).wait(work)
            return delivered(near, whole, out)

        start = partial(self._carriers.all_gather, near, sizes, self.rank)
        return on_its_stream(near, start), finish

    def _combined(self, work, total, op, out):
        result = delivered(work, total, out)
        if op == "mean":
            total.div_(self.world_size)
        return result

    def _finish(self):
        call = self._call("finish")
        with self.progress.inside(call):
            self._comparison.meet(call)
        for group in self._groups:
            if group._open:
                group._finish()

    def _free(self):
        self._open = False
        self._comparison.close()
        for group in self._groups:
            if group._open:
                group._free()
        if self._group is None:
            self._lookout.close()
            if dist.is_initialized():  # a program may have ended it
                dist.destroy_process_group()
        else:
            self._carriers.link.close()

    def _let_go(self):
        # After a failure a thread may wait for ever, and closing would too: only if all went well.
        for group in self._groups:
            group._let_go()
        self._carriers.close()


def init_torch(
    backend: str,
    rank: int,
    world_size: int,
    store: dist.Store,
    timeout_s: float = 60.0,
    check: bool = True,
    *,
    local_rank: int | None = None,
) -> TorchCommunicator:
    """Connect the ranks and make the communicator of this one; its close() takes all down again.

    backend     "gloo", or "nccl" for GPUs, one for each rank
    rank        this rank
    world_size  number of ranks
    store       that all ranks share, such as torch.distributed.FileStore
    timeout_s   after which a call gives up
    check       compare the ranks' calls before each collective
    local_rank  this rank among those on its machine, the number of its GPU; None: rank itself

    Communicates: every rank must call it.
    Raises InputError for an unknown backend, where there is no GPU for this rank, or where torch's
    default group is there already; CommunicationError if the ranks do not find each other.
    """
    local_rank = rank if local_rank is None else local_rank
    link = connect_world(backend, rank, world_size, store, timeout_s, local_rank)
    return TorchCommunicator(link, check=check)
