"""All_reduce for hosts with several ranks, which talk faster inside a host than between hosts.

Chapter 07 counts what leaves a host. Production libraries find out who shares a host, and in it a
bus or a network card, and build their rings and trees along those.
"""

from torch import Tensor

from slimlab.comm.collectives_ring import gather_on_ring, reduce_on_ring, ring_scratch
from slimlab.comm.collectives_shared import (
    cut,
    finish,
    fold_in,
    fold_out,
    part_bounds,
    prepare,
    scratch,
)
from slimlab.comm.messages import Messages
from slimlab.config import check_number


def two_level_all_reduce(
    comm: Messages,
    tensor: Tensor,
    ranks_per_host: int,
    op: str = "sum",
    *,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """Combine the tensors of all ranks: inside each host, then between hosts, then inside again.

    First a ring_reduce_scatter among the q ranks of a host: the rank at place l in its host then
    has part l of q, complete for its host. Second a ring_all_reduce of that part among the ranks at
    place l of all h hosts: all q of these rings at once. Third a ring_all_gather in the host.

    Of a host leave 2 (h - 1) / h of the tensor, the least possible, in 2 (h - 1) steps, where one
    ring through all ranks takes 2 (w - 1). Each element is completed on one rank and copied from
    there, so all ranks end with the same bits. The ranks of a last host that is not full hand
    their tensors to the first host's and wait: right, but not fast.

    comm            a communicator whose ranks fill one host after the other
    tensor          this rank's part of the sum, any shape; same shape and dtype on every rank
    ranks_per_host  q, from 1 to the number of ranks
    op              "sum", "mean", "max" or "min"
    out             where to put the result; may be tensor itself; None: a new tensor
    work            scratch of one dim, of tensor's dtype and at least tensor.numel() + 1 elements,
                    to be used again; None: new memory in every call
    returns         the result, the same on every rank; tensor is left as it is, unless it is out

    Communicates: 2 (q - 1) messages of 1/q of the tensor inside a host and 2 (h - 1) of 1/(q h)
    between hosts, out and as many in.
    Raises InputError for arguments that do not fit.
    """
    name = "two_level_all_reduce"
    check_number("ranks_per_host", ranks_per_host, int, 1, comm.world_size)
    out, held, total = prepare(name, tensor, op, out)
    core = comm.world_size - comm.world_size % ranks_per_host
    local = comm.rank % ranks_per_host
    bounds = part_bounds(held.numel(), ranks_per_host)
    column_bounds = part_bounds(bounds[local + 1] - bounds[local], core // ranks_per_host)
    folded = held.numel() if core < comm.world_size else 0
    needed = max(ring_scratch(bounds), ring_scratch(column_bounds), folded)
    work = scratch(name, work, needed, held)
    held = fold_in(comm, core, held, total, op, work)
    if comm.rank < core:
        host = range(comm.rank - local, comm.rank - local + ranks_per_host)
        column = range(local, core, ranks_per_host)
        parts = cut(total, bounds)
        pieces = cut(parts[local], column_bounds)
        piece = pieces[comm.rank // ranks_per_host]
        reduce_on_ring(comm, host, cut(held, bounds), op, parts[local], work)
        reduce_on_ring(comm, column, pieces, op, piece, work)
        finish(piece, op, comm.world_size)
        gather_on_ring(comm, column, pieces)
        gather_on_ring(comm, host, parts)
    fold_out(comm, core, total)
    return out
