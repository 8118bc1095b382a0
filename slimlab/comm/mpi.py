"""Ranks that MPI started, with mpi4py: the same calls as on threads, carried by a real library.

Chapter 07 uses it. Our names are torch.distributed's; this table says once what MPI calls them.

    send, recv           MPI_Send, MPI_Recv        all_reduce       MPI_Allreduce
    isend, irecv         MPI_Isend, MPI_Irecv      all_gather       MPI_Allgather(v)
    Handle.wait          MPI_Wait                    ... async_op   the same with MPI_I...
    sendrecv             MPI_Sendrecv              reduce_scatter   MPI_Reduce_scatter(_block)
    barrier              MPI_Barrier               gather, scatter  MPI_Gather(v), MPI_Scatter(v)
    broadcast            MPI_Bcast                 all_to_all       MPI_Alltoall(v)
    reduce               MPI_Reduce                split            MPI_Comm_split

No tensor is pickled, and none is copied unless it has to be: contiguous memory is handed to MPI as
it is. MPI has no 16-bit floats: float16 and bfloat16 are combined as float32 and rounded once, at
the end. The order in which MPI combines is its own, so sums may differ in the last bits from those
on threads; a max or min of NaN may be either. Open MPI 5 takes fewer than 2^31 elements in a call,
MPICH any number. Importing this module starts MPI, with support for threads where it has that.

MPI itself compares nothing, trusts that counts match, and leaves shapes to the program.
"""

from functools import partial

import torch
from mpi4py import MPI

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Handle, check_out
from slimlab.comm.groups import Group, check_exchange, groups_of
from slimlab.comm.mpi_buffers import (
    OPS,
    Staging,
    counts_of,
    form,
    memory,
    moved,
    reachable,
    reduced,
    reduced_dtype,
    row_of,
)
from slimlab.comm.mpi_compare import Comparison
from slimlab.comm.mpi_messages import Port
from slimlab.comm.mpi_transport import Transport, sleeps_when_waiting
from slimlab.comm.wire import HEADER_BYTES, as_bytes, header_of, read_header


class MPICommunicator(Communicator):
    """The communicator of a rank that MPI started.

    mpi_comm  a communicator of MPI that nobody else uses
    check     compare the ranks' calls before each collective
    device    where tensors lie that recv and scatter make
    parent    the communicator that was split
    ranks     of the world, if this came from split
    """

    backend = "mpi"

    def __init__(
        self,
        mpi_comm: MPI.Comm,
        *,
        check: bool = True,
        device: str | torch.device = "cpu",
        parent: "MPICommunicator | None" = None,
        ranks: tuple[int, ...] | None = None,
    ):
        shared = {} if parent is None else {"ledger": parent.ledger, "progress": parent.progress}
        super().__init__(mpi_comm.rank, mpi_comm.size, ranks=ranks, **shared)
        self.device, self._check = torch.device(device), check
        self._data, self._control = channels = mpi_comm, mpi_comm.Dup()
        if parent is None:
            self._transport = Transport(self.rank, self.progress, sleeps_when_waiting(mpi_comm))
            self._staging = Staging(reachable())
        else:
            self._transport, self._staging = parent._transport, parent._staging
        where = self.ranks, ranks, self.device
        self._port = Port(self._transport, *channels, self._staging, *where)
        self._open = True
        self._comparison = Comparison(self._transport, self._control, check)
        self._groups: list[MPICommunicator] = []

    def close(self) -> None:
        """Wait until every rank has finished, and free what this communicator and its groups hold.

        Communicates: one agreement that all have finished, and what is left of messages.
        Raises, if the ranks are compared, MismatchError if one has skipped a collective,
        UnreceivedError for messages that nobody received, UnwaitedError for calls that were started
        and never waited for.
        """
        if not self._open:
            return
        # In which of its groups a rank skipped a call nobody knows: all are compared at once.
        closing = self._family()
        begun = [(one, one._comparison.begin(one._call("finish"))) for one in closing]
        with self.progress.inside(self._call("finish")):
            self._transport.look_until(
                lambda: all([one._comparison.is_settled(number) for one, number in begun])
            )
            if not self._check:
                self._collect("Barrier", 0)
        if self._check:
            self._comparison.check_nothing_is_left(self._group)
        for one in closing:
            one._free()

    def _send(self, call, tensor, dst, tag):
        self._port.send(tensor, dst, tag)

    def _recv(self, call, src, tag, out):
        return self._port.recv(src, tag, out)

    def _isend(self, call, tensor, dst, tag):
        return self._port.isend(tensor, dst, tag)

    def _irecv(self, call, src, tag, out):
        return Handle(self._port.irecv(src, tag, out).finish)

    def _sendrecv(self, call, tensor, dst, src, tag, out):
        return self._port.sendrecv(tensor, dst, src, tag, out)

    def _barrier(self, call):
        if self._check:
            self._comparison.check(call)  # nobody comes out of it before all have come in
        else:
            self._collect("Barrier", 0)

    def _broadcast(self, call, tensor, src, out):
        self._comparison.check(call)
        if self.rank == src:
            work = self._staging.copy(tensor, tensor.dtype, out)
        else:
            work = self._staging.empty(tensor.shape, tensor.dtype, tensor.device, out)
        self._collect("Bcast", tensor.nbytes, moved(work), src)
        return self._staging.deliver(work, tensor.dtype, tensor.device, out)

    def _reduce(self, call, tensor, dst, op, out):
        dtype = reduced_dtype(tensor.dtype)
        self._comparison.check(call)
        if self.rank != dst:
            part = self._staging.outgoing(tensor, dtype)
            self._collect("Reduce", tensor.nbytes, reduced(part), None, OPS[op], dst)
            return None
        total = self._staging.copy(tensor, dtype, out)
        self._collect("Reduce", tensor.nbytes, MPI.IN_PLACE, reduced(total), OPS[op], dst)
        return self._combined(total, tensor, op, out)

    def _all_reduce(self, call, tensor, op, out):
        dtype = reduced_dtype(tensor.dtype)
        self._comparison.check(call)
        total = self._staging.copy(tensor, dtype, out)
        self._collect("Allreduce", tensor.nbytes, MPI.IN_PLACE, reduced(total), OPS[op])
        return self._combined(total, tensor, op, out)

    def _all_reduce_async(self, call, tensor, op, out):
        total = self._staging.copy(tensor, reduced_dtype(tensor.dtype), out)
        args = MPI.IN_PLACE, reduced(total), OPS[op]
        deliver = partial(self._combined, total, tensor, op, out)
        return self._comparison.start(self._data, call, "Allreduce", args, deliver)

    def _reduce_scatter(self, call, tensor, op, sizes, out):
        dtype = reduced_dtype(tensor.dtype)
        self._comparison.check(call)
        whole = self._staging.outgoing(tensor, dtype)
        shape = (sizes[self.rank], *tensor.shape[1:])
        part = self._staging.empty(shape, dtype, tensor.device, out)
        v, counts = form(sizes, tensor)
        name, more = ("Reduce_scatter", [counts]) if v else ("Reduce_scatter_block", [])
        self._collect(name, tensor.nbytes, reduced(whole), reduced(part), *more, OPS[op])
        return self._combined(part, tensor, op, out)

    def _all_gather(self, call, tensor, sizes, out):
        self._comparison.check(call)
        part, whole = self._staging.outgoing(tensor), self._whole(tensor, sizes, out)
        v, counts = form(sizes, tensor)
        self._collect("Allgather" + v, whole.nbytes, moved(part), moved(whole, counts))
        return self._staging.deliver(whole, tensor.dtype, tensor.device, out)

    def _all_gather_async(self, call, tensor, sizes, out):
        part, whole = self._staging.outgoing(tensor), self._whole(tensor, sizes, out)
        v, counts = form(sizes, tensor)
        deliver = partial(self._staging.deliver, whole, tensor.dtype, tensor.device, out)
        args = moved(part), moved(whole, counts)
        return self._comparison.start(self._data, call, "Allgather" + v, args, deliver)

    def _gather(self, call, tensor, dst, sizes, out):
        self._comparison.check(call)
        part, (v, counts) = self._staging.outgoing(tensor), form(sizes, tensor)
        n_bytes = sum(sizes) * row_of(tensor) * tensor.element_size()
        if self.rank != dst:
            self._collect("Gather" + v, n_bytes, moved(part), None, dst)
            return None
        whole = self._whole(tensor, sizes, out)
        self._collect("Gather" + v, n_bytes, moved(part), moved(whole, counts), dst)
        return self._staging.deliver(whole, tensor.dtype, tensor.device, out)

    def _scatter(self, call, tensor, src, sizes, out):
        self._comparison.check(call)
        described, sizes = self._plan(tensor, sizes, src)
        shape = (sizes[self.rank], *described.shape[1:])
        home = out if out is not None else tensor
        device = self.device if home is None else home.device
        fits = out is not None and out.dtype == described.dtype and tuple(out.shape) == shape
        part = self._staging.empty(shape, described.dtype, device, out if fits else None)
        v, counts = form(sizes, part)
        whole = None if tensor is None else self._staging.outgoing(tensor)
        parts = None if whole is None else moved(whole, counts)
        self._collect("Scatter" + v, described.n_bytes, parts, moved(part), src)
        check_out(call.name, out, shape, part)
        return self._staging.deliver(part, described.dtype, device, out)

    def _all_to_all(self, call, tensor, send_sizes, recv_sizes, out):
        self._comparison.check(call)
        parts, whole = self._staging.outgoing(tensor), self._whole(tensor, recv_sizes, out)
        uneven = "uneven" in call.arguments
        if uneven and self._check:
            check_exchange(self._all_sizes(send_sizes, recv_sizes))
        v, counts = ("v", counts_of(send_sizes, tensor)) if uneven else ("", None)
        its_counts = counts_of(recv_sizes, tensor) if uneven else None
        n_bytes = 0 if uneven else tensor.nbytes  # the same on every rank
        self._collect("Alltoall" + v, n_bytes, moved(parts, counts), moved(whole, its_counts))
        return self._staging.deliver(whole, tensor.dtype, tensor.device, out)

    def _split(self, call, color, key):
        self._comparison.check(call)
        mine = torch.tensor([color is not None, color or 0, key], device="cpu")
        all_ = torch.empty((self.world_size, 3), dtype=torch.int64, device="cpu")
        self._collect("Allgather", 0, moved(mine), moved(all_))
        wishes = [(its if has else None, order) for has, its, order in all_.tolist()]
        made: list[Group] = []

        def new_group(ranks: tuple[int, ...]) -> Group:
            made.append(Group(len(made), ranks))
            return made[-1]

        group = groups_of(wishes, self.ranks, new_group)[self.rank]
        if group is None:
            self._data.Split(MPI.UNDEFINED)
            return None
        me = group.ranks.index(self.ranks[self.rank])
        mpi_comm = self._data.Split(group.context, me)
        self._groups.append(
            MPICommunicator(
                mpi_comm, check=self._check, device=self.device, parent=self, ranks=group.ranks
            )
        )
        return self._groups[-1]

    def _collect(self, name, n_bytes, *args):
        # The comparison of calls lets nobody on before all have come.
        self._transport.collect(self._data, name, n_bytes, self._check, *args)

    def _whole(self, tensor, sizes, out):
        shape = (sum(sizes), *tensor.shape[1:])
        return self._staging.empty(shape, tensor.dtype, tensor.device, out)

    def _combined(self, work, tensor, op, out):
        if op == "mean":
            work.div_(self.world_size)
        return self._staging.deliver(work, tensor.dtype, tensor.device, out)

    def _plan(self, tensor, sizes, src):
        plan = torch.empty(HEADER_BYTES + 8 * self.world_size, dtype=torch.uint8, device="cpu")
        if tensor is not None:
            memory(plan)[:HEADER_BYTES] = header_of(tensor)
            plan[HEADER_BYTES:] = as_bytes(torch.tensor(sizes, device="cpu"))
        self._collect("Bcast", 0, moved(plan), src)
        sizes = plan[HEADER_BYTES:].clone().view(torch.int64).tolist()
        return read_header(memory(plan)), sizes

    def _all_sizes(self, send_sizes, recv_sizes):
        mine = torch.tensor([send_sizes, recv_sizes], device="cpu")
        all_ = mine.new_empty((self.world_size, 2, self.world_size))
        self._collect("Allgather", 0, moved(mine), moved(all_))
        return all_.tolist()

    def _family(self):
        open_groups = [group for group in self._groups if group._open]
        return [self, *(one for group in open_groups for one in group._family())]

    def _free(self):
        self._open = False
        for mpi_comm in (self._control, self._data):
            if mpi_comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
                mpi_comm.Free()


def world_communicator(
    *, check: bool = True, device: str | torch.device = "cpu"
) -> MPICommunicator:
    """Make the communicator of all ranks that MPI started.

    check   compare the ranks' calls before each collective
    device  where tensors lie that recv and scatter make

    Communicates: every rank must call it.
    """
    return MPICommunicator(MPI.COMM_WORLD.Dup(), check=check, device=device)
