"""All_to_all by pairs: in every step each rank sends to one rank and receives from one.

Chapter 07 draws it; layers of experts use it most. Production libraries send short parts in fewer,
longer messages that go by way of other ranks (Bruck et al. 1997).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.comm.calls import check_apart, check_out, check_payload
from slimlab.comm.collectives_ring import row_bounds
from slimlab.comm.collectives_shared import TAG, cut
from slimlab.comm.messages import Messages
from slimlab.comm.parts import check_rows, check_sizes, equal_sizes
from slimlab.config import require


def pairwise_all_to_all(
    comm: Messages,
    tensor: Tensor,
    *,
    send_sizes: Sequence[int] | None = None,
    recv_sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Send part j to rank j, and get part number `rank` of every rank.

    In step s a rank sends to the one s places further and receives from the one s places before:
    no two send to the same, as they would if all began with rank 0. Nothing is combined, and no
    part is sent twice, so no other order moves fewer bytes.

    comm        a communicator
    tensor      parts for all ranks, one behind the other along dim 0; same dtype and, but for dim
                0, same shape on every rank
    send_sizes  rows for each rank; None: equal parts
    recv_sizes  rows from each rank; None: equal parts. Give both or neither
    out         where to put the result; not tensor itself; None: a new tensor
    returns     the parts from all ranks, one behind the other in rank order

    Communicates: w - 1 messages out and as many in, each of one part; empty parts too.
    Raises InputError for arguments that do not fit.
    """
    name, world_size = "pairwise_all_to_all", comm.world_size
    check_payload(name, tensor)
    check_rows(name, tensor)
    require(
        (send_sizes is None) == (recv_sizes is None),
        f"{name}: both send_sizes and recv_sizes, or neither",
        f"send_sizes = {send_sizes}, recv_sizes = {recv_sizes}",
        "tell each rank what it sends and what it gets",
    )
    if send_sizes is None:
        send_sizes = recv_sizes = equal_sizes(name, tensor.shape[0], world_size)
    send_sizes = check_sizes(name, send_sizes, world_size, tensor.shape[0])
    recv_sizes = check_sizes(name, recv_sizes, world_size, None)
    require(
        send_sizes[comm.rank] == recv_sizes[comm.rank],
        f"{name}: recv_sizes[{comm.rank}] = {send_sizes[comm.rank]} on rank {comm.rank}, since it "
        "keeps so many rows",
        f"recv_sizes[{comm.rank}] = {recv_sizes[comm.rank]}",
        "recv_sizes of a rank are what all ranks have for it in their send_sizes",
    )
    shape = (sum(recv_sizes), *tensor.shape[1:])
    check_out(name, out, shape, tensor)
    check_apart(name, tensor, out, may_be_same=False)
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device) if out is None else out
    given = cut(tensor.detach().reshape(-1), row_bounds(send_sizes, tensor))
    taken = cut(out.detach().view(-1), row_bounds(recv_sizes, tensor))
    taken[comm.rank].copy_(given[comm.rank])
    for step in range(1, world_size):
        dst, src = (comm.rank + step) % world_size, (comm.rank - step) % world_size
        comm.sendrecv(given[dst], dst, src, TAG, out=taken[src])
    return out
