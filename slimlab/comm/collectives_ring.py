"""Collectives on a ring: every rank sends to the next and receives from the one before.

A ring uses all links in every step and moves nothing twice, so it moves as few bytes as is
possible; its price is a number of steps that grows with the number of ranks. Chapter 07 draws it.

Patarasuk and Yuan 2009 (J. Parallel Distrib. Comput. 69). Production libraries (NCCL)
cut parts into slices and send the first while the second is still being added.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from slimlab.comm.calls import check_apart, check_out, check_payload, check_reduction
from slimlab.comm.collectives_shared import (
    TAG,
    combine,
    cut,
    finish,
    part_bounds,
    prepare,
    scratch,
)
from slimlab.comm.messages import Messages
from slimlab.comm.parts import check_rows, check_sizes, equal_sizes
from slimlab.config import require


def ring_all_reduce(
    comm: Messages,
    tensor: Tensor,
    op: str = "sum",
    *,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """Combine the tensors of all ranks: ring_reduce_scatter, then ring_all_gather of the parts.

    With w ranks each of both halves takes w - 1 steps, in which every rank sends one of w parts: in
    all 2 (w - 1) / w of the tensor, and less is not possible (slimlab.plan.messages says why).
    After the first half, part r is complete on rank r and nowhere else: one rank does the last
    addition, the others get copies. So all ranks end with the same bits.

    comm     a communicator
    tensor   this rank's part of the sum, any shape; the same shape and dtype on every rank
    op       "sum", "mean", "max" or "min"
    out      where to put the result; may be tensor itself; None: a new tensor
    work     scratch of one dim, of tensor's dtype and at least tensor.numel() + 1 elements, to be
             used again; None: new memory in every call
    returns  the result, the same on every rank; tensor is left as it is, unless it is out

    Communicates: 2 (w - 1) messages out and as many in, each of a part; empty parts too.
    Raises InputError for arguments that do not fit.
    """
    out, own, total = prepare("ring_all_reduce", tensor, op, out)
    ring, bounds = range(comm.world_size), part_bounds(own.numel(), comm.world_size)
    parts = cut(total, bounds)
    work = scratch("ring_all_reduce", work, ring_scratch(bounds), own)
    reduce_on_ring(comm, ring, cut(own, bounds), op, parts[comm.rank], work)
    finish(parts[comm.rank], op, comm.world_size)
    gather_on_ring(comm, ring, parts)
    return out


def ring_reduce_scatter(
    comm: Messages,
    tensor: Tensor,
    op: str = "sum",
    *,
    sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Combine the tensors of all ranks, and leave each rank one part of the result.

    Each part travels once round the ring as a partial sum, to which every rank adds its own. Part j
    sets out on rank j + 1, so that rank j is the last to add and keeps it. After step s, the
    partial sum that a rank has just received holds s + 2 ranks' parts, its own included.

    comm     a communicator
    tensor   all parts, one behind the other along dim 0; the same shape and dtype on every rank
    op       "sum", "mean", "max" or "min"
    sizes    rows of each rank's part; None: equal parts
    out      where to put this rank's part; None: a new tensor
    returns  part number `rank` of the result: a shard

    Communicates: w - 1 messages out and as many in, each a partial sum of one part.
    Raises InputError for arguments that do not fit.
    """
    name = "ring_reduce_scatter"
    check_payload(name, tensor)
    check_rows(name, tensor)
    check_reduction(op, tensor.dtype)
    if sizes is None:
        sizes = equal_sizes(name, tensor.shape[0], comm.world_size)
    sizes = check_sizes(name, sizes, comm.world_size, tensor.shape[0])
    shape = (sizes[comm.rank], *tensor.shape[1:])
    check_out(name, out, shape, tensor)
    check_apart(name, tensor, out, may_be_same=False)
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device) if out is None else out
    bounds = row_bounds(sizes, tensor)
    own = tensor.detach().reshape(-1)
    total = out.detach().view(-1)
    work = scratch(name, None, ring_scratch(bounds), own)
    reduce_on_ring(comm, range(comm.world_size), cut(own, bounds), op, total, work)
    finish(total, op, comm.world_size)
    return out


def ring_all_gather(
    comm: Messages,
    tensor: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Join the parts of all ranks, for every rank.

    In the first step each rank sends its own part on, then always the part that it has just got:
    after step s it holds s + 2 parts, and after w - 1 steps all of them.

    comm     a communicator
    tensor   this rank's part, a shard; same dtype and, but for dim 0, same shape on every rank
    sizes    rows of each rank's part, the same list on every rank; None: all as this one
    out      where to put the whole; None: a new tensor
    returns  the parts, one behind the other in rank order, the same on every rank

    Communicates: w - 1 messages out and as many in, each of one part.
    Raises InputError for arguments that do not fit.
    """
    name = "ring_all_gather"
    check_payload(name, tensor)
    check_rows(name, tensor)
    sizes = [tensor.shape[0]] * comm.world_size if sizes is None else sizes
    sizes = check_sizes(name, sizes, comm.world_size, None)
    require(
        sizes[comm.rank] == tensor.shape[0],
        f"{name}: a part of sizes[{comm.rank}] = {sizes[comm.rank]} rows",
        f"{tensor.shape[0]} rows on rank {comm.rank}",
        "give every rank the same list, in rank order",
    )
    shape = (sum(sizes), *tensor.shape[1:])
    check_out(name, out, shape, tensor)
    check_apart(name, tensor, out, may_be_same=False)
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device) if out is None else out
    parts = cut(out.detach().view(-1), row_bounds(sizes, tensor))
    parts[comm.rank].copy_(tensor.detach().reshape(-1))
    gather_on_ring(comm, range(comm.world_size), parts)
    return out


def reduce_on_ring(
    comm: Messages,
    ring: Sequence[int],
    parts: Sequence[Tensor],
    op: str,
    total: Tensor,
    work: Tensor,
) -> None:
    """Combine each part along a ring; the rank at place p of the ring keeps part p.

    comm   a communicator
    ring   the ranks that take part, in the order in which they send; this rank is one
    parts  this rank's parts, one per place, each of shape (n,); left as they are
    op     "sum", "mean", "max" or "min"
    total  where this place's part of the result goes; may be that part
    work   scratch of ring_scratch elements

    Communicates: len(ring) - 1 messages out and as many in.
    """
    size, place = len(ring), ring.index(comm.rank)
    if size == 1:
        total.copy_(parts[0])
    right, left = ring[(place + 1) % size], ring[place - 1]
    slot = max(part.numel() for part in parts)
    partial = parts[place - 1]
    for step in range(size - 1):
        part = parts[(place - 2 - step) % size]
        # One slot is being sent while the other receives.
        start = slot * (step % 2)
        arrived = comm.sendrecv(partial, right, left, TAG, out=work[start : start + part.numel()])
        partial = total if step == size - 2 else arrived
        combine(arrived, part, op, out=partial)


def gather_on_ring(comm: Messages, ring: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Pass parts along a ring until every rank in it has them all.

    comm   a communicator
    ring   the ranks that take part, in the order in which they send; this rank is one
    parts  one per place, each of shape (n,); that of this place is sent, the others are received

    Communicates: len(ring) - 1 messages out and as many in.
    """
    size, place = len(ring), ring.index(comm.rank)
    right, left = ring[(place + 1) % size], ring[place - 1]
    for step in range(size - 1):
        given, taken = parts[place - step], parts[place - step - 1]
        comm.sendrecv(given, right, left, TAG, out=taken)


def ring_scratch(bounds: Sequence[int]) -> int:
    """Return how many elements of scratch reduce_on_ring needs.

    bounds  of the parts
    """
    largest = max(high - low for low, high in zip(bounds, bounds[1:]))
    return largest * min(len(bounds) - 2, 2)


def row_bounds(sizes: Sequence[int], tensor: Tensor) -> list[int]:
    """Return the bounds of parts in the flat tensor.

    sizes   rows of each part
    tensor  whose rows they are
    """
    per_row = prod(tensor.shape[1:])
    return [rows * per_row for rows in accumulate(sizes, initial=0)]
