"""Ranks as threads of one process: instant, deterministic, and every deadlock is found at once.

The ranks take turns (slimlab.comm.world): a program runs in the same order every time, prints in
the same order and fails in the same way. Each rank has random states of its own, torch's on the CPU
and Python's, which start as copies of the caller's.

Chapter 00 uses these ranks first, chapter 07 explains them. What real ranks do and these do not:
run at the same time, live in separate memory (here a tensor can reach another rank through a
Python variable as well as through a message), lose messages, take time on the wire. Sends are
buffered without limit, where MPI waits for the receiver of a large message, unless `eager_bytes`
gives the limit. A torch.no_grad() around run_ranks does not reach into the ranks.
"""

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Handle, check_out
from slimlab.comm.groups import Group, check_exchange, groups_of
from slimlab.comm.mail import Address
from slimlab.comm.reductions import reduce_in_rank_order
from slimlab.comm.wire import Described, check_fits
from slimlab.comm.world import World


class ThreadCommunicator(Communicator):
    """The communicator of a rank that is a thread.

    rank        this rank
    world_size  number of ranks
    world       what the ranks of the run share
    group       of ranks, if not all
    parent      the communicator that was split
    """

    backend = "threads"

    def __init__(
        self,
        rank: int,
        world_size: int,
        world: World,
        group: Group | None = None,
        parent: "ThreadCommunicator | None" = None,
    ):
        shared = {}
        if parent is not None:
            shared = {
                "ranks": group.ranks,
                "ledger": parent.ledger,
                "progress": parent.progress,
            }
        super().__init__(rank, world_size, **shared)
        self._world = world
        self._among = group or Group(0, self.ranks)
        self._me = self.ranks[rank]

    def _send(self, call, tensor, dst, tag):
        self._isend(call, tensor, dst, tag).wait()

    def _isend(self, call, tensor, dst, tag):
        copy = tensor.clone(memory_format=torch.contiguous_format)
        letter = self._world.post(self._address(self.rank, dst, tag), copy)
        n_bytes = copy.numel() * copy.element_size()
        return Handle(lambda: self._world.deliver(self.progress.call, letter, n_bytes))

    def _recv(self, call, src, tag, out):
        return self._irecv(call, src, tag, out).wait()

    def _irecv(self, call, src, tag, out):
        letter = self._world.ask(self._address(src, self.rank, tag))

        def finish():
            tensor = self._world.fetch(self.progress.call, letter)
            n_bytes = tensor.numel() * tensor.element_size()
            check_fits(Described(tensor.dtype, tuple(tensor.shape), n_bytes), out, src, tag)
            return _into(out, tensor)

        return Handle(finish)

    def _barrier(self, call):
        self._meet(call, None, lambda nothing: nothing)

    def _broadcast(self, call, tensor, src, out):
        def combine(tensors):
            whole = tensors[src].clone(memory_format=torch.contiguous_format)
            return _copies(whole, len(tensors))

        return _into(out, self._meet(call, tensor, combine))

    def _reduce(self, call, tensor, dst, op, out):
        def combine(tensors):
            total = reduce_in_rank_order(tensors, op)
            return [total if rank == dst else None for rank in range(len(tensors))]

        total = self._meet(call, tensor, combine)
        return None if total is None else _into(out, total)

    def _all_reduce(self, call, tensor, op, out):
        return self._all_reduce_async(call, tensor, op, out).wait()

    def _all_reduce_async(self, call, tensor, op, out):
        def combine(tensors):
            return _copies(reduce_in_rank_order(tensors, op), len(tensors))

        meeting = self._world.come(self._me, self._among, call, tensor, combine)
        return Handle(lambda: _into(out, self._attend(meeting)))

    def _reduce_scatter(self, call, tensor, op, sizes, out):
        def combine(tensors):
            return [one.clone() for one in reduce_in_rank_order(tensors, op).split(sizes)]

        return _into(out, self._meet(call, tensor, combine))

    def _all_gather(self, call, tensor, sizes, out):
        return self._all_gather_async(call, tensor, sizes, out).wait()

    def _all_gather_async(self, call, tensor, sizes, out):
        def combine(tensors):
            return _copies(torch.cat(tensors), len(tensors))

        meeting = self._world.come(self._me, self._among, call, tensor, combine)
        return Handle(lambda: _into(out, self._attend(meeting)))

    def _gather(self, call, tensor, dst, sizes, out):
        def combine(tensors):
            whole = torch.cat(tensors)
            return [whole if rank == dst else None for rank in range(len(tensors))]

        whole = self._meet(call, tensor, combine)
        return None if whole is None else _into(out, whole)

    def _scatter(self, call, tensor, src, sizes, out):
        def combine(brought):
            whole, its_sizes = brought[src]
            return [part.clone() for part in whole.split(its_sizes)]

        part = self._meet(call, (tensor, sizes), combine)
        check_out(call.name, out, part.shape, part)
        return _into(out, part)

    def _all_to_all(self, call, tensor, send_sizes, recv_sizes, out):
        def combine(brought):
            check_exchange([one[1:] for one in brought])
            parts = [whole.split(sizes) for whole, sizes, _ in brought]
            return [torch.cat([row[rank] for row in parts]) for rank in range(len(brought))]

        return _into(out, self._meet(call, (tensor, send_sizes, recv_sizes), combine))

    def _split(self, call, color, key):
        def combine(wishes):
            return groups_of(wishes, self._among.ranks, self._world.new_group)

        group = self._meet(call, (color, key), combine)
        if group is None:
            return None
        return ThreadCommunicator(
            group.ranks.index(self._me), len(group.ranks), self._world, group, parent=self
        )

    def _meet(self, call, payload, combine):
        meeting = self._world.come(self._me, self._among, call, payload, combine)
        return self._attend(meeting)

    def _attend(self, meeting):
        return self._world.attend(self._me, self.progress.call, meeting)

    def _address(self, src, dst, tag):
        return Address(self._among.context, self.ranks[src], self.ranks[dst], tag)


def _copies(tensor: Tensor, number: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(number - 1))]


def _into(out: Tensor | None, tensor: Tensor) -> Tensor:
    if out is None:
        return tensor
    out.detach().copy_(tensor)  # out may be a parameter
    return out
