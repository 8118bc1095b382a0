"""Gather, scatter and barrier in the clearest way, written with send and receive only.

A dialled network (slimlab.comm.network) carries out these collectives with them. One rank handles
every message of a gather or a scatter, so its port is what they wait for, and a tree would not make
long parts faster. Production libraries use trees for short parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.comm.messages import Messages


def direct_gather(
    comm: Messages, tensor: Tensor, dst: int = 0, *, out: Tensor | None = None
) -> Tensor | None:
    """Join the parts of all ranks, for one rank: every other sends it its part.

    comm     a communicator
    tensor   this rank's part; same dtype and, but for dim 0, same shape on every rank
    dst      the rank that gets the whole
    out      on dst, where to put the whole; None: a new tensor
    returns  the parts, one behind the other in rank order, on dst; None on the others

    Communicates: one message from every rank but dst, to dst.
    """
    if comm.rank != dst:
        comm.send(tensor, dst)
        return None
    parts = [tensor if src == dst else comm.recv(src) for src in range(comm.world_size)]
    whole = torch.cat(parts)
    return whole if out is None else out.copy_(whole)


def direct_scatter(
    comm: Messages,
    tensor: Tensor | None,
    src: int = 0,
    *,
    sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Hand out the parts of one rank's tensor: it sends every other its part.

    comm     a communicator
    tensor   on src all parts, one behind the other; ignored elsewhere
    src      the rank whose tensor it is
    sizes    on src, rows of each rank's part; ignored elsewhere
    out      where to put this rank's part; None: a new tensor
    returns  part number `rank`: a shard

    Communicates: one message from src to every other rank.
    """
    if comm.rank != src:
        return comm.recv(src, out=out)
    parts = tensor.split(list(sizes))
    started = [comm.isend(part, dst) for dst, part in enumerate(parts) if dst != src]
    own = parts[src].clone() if out is None else out.copy_(parts[src])
    for handle in started:
        handle.wait()
    return own


def dissemination_barrier(comm: Messages) -> None:
    """Wait until every rank has come here: in every round, each tells one that is twice as far.

    After round k a rank has heard, directly or through others, of the 2^(k + 1) - 1 ranks before
    it (Hensgen, Finkel and Manber 1988, International Journal of Parallel Programming 17).

    comm  a communicator

    Communicates: log2 w messages without payload out and as many in, rounded up.
    """
    distance, nothing = 1, torch.empty(0, device=comm.device)
    while distance < comm.world_size:
        dst, src = comm.rank + distance, comm.rank - distance
        comm.sendrecv(nothing, dst % comm.world_size, src % comm.world_size)
        distance *= 2
