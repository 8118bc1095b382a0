"""Collectives on a binomial tree, and the broadcast for long tensors that is none.

The tree grows by doubling: in round s, each of the 2^s ranks that are in it takes a new one, at
distance 2^s. After log2 w rounds all are in. Ranks are counted from the root, round the ring.
Chapter 07 draws the tree.

Folklore; Thakur, Rabenseifner and Gropp 2005 (Int. J. High Perform. Comput. Appl. 19), with van
de Geijn's scatter and all_gather. Production libraries choose by length between the two.
"""

import torch
from torch import Tensor

from slimlab.comm.calls import check_apart, check_out, check_payload, check_reduction
from slimlab.comm.collectives_ring import gather_on_ring
from slimlab.comm.collectives_shared import (
    TAG,
    combine,
    cut,
    finish,
    largest_power_of_two,
    part_bounds,
    scratch,
)
from slimlab.comm.messages import Messages
from slimlab.config import check_number


def binomial_broadcast(
    comm: Messages, tensor: Tensor, src: int = 0, *, out: Tensor | None = None
) -> Tensor:
    """Give every rank the tensor of one: who has it gives it to one more, in every round.

    The number of ranks that have it doubles each round, and cannot do more if each sends one
    message at a time; but each message is the whole tensor: for short ones.

    comm     a communicator
    tensor   the same shape and dtype on every rank; only that of src counts
    src      the rank whose tensor it is
    out      where to put it; may be tensor itself; None: a new tensor
    returns  the tensor of src, the same on every rank

    Communicates: one message in for every rank but src; one out for each child, of which src has
    log2 w, rounded up.
    Raises InputError for arguments that do not fit.
    """
    out, flat = _start("binomial_broadcast", comm, tensor, src, out)
    parent, children = parent_and_children((comm.rank - src) % comm.world_size, comm.world_size)
    if parent is not None:
        comm.recv((parent + src) % comm.world_size, TAG, out=flat)
    for child in children:
        comm.send(flat, (child + src) % comm.world_size, TAG)
    return out


def binomial_reduce(
    comm: Messages,
    tensor: Tensor,
    dst: int = 0,
    op: str = "sum",
    *,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor | None:
    """Combine the tensors of all ranks for one: the tree of the broadcast, with time reversed.

    Each rank adds what its children send, the last one that a broadcast would serve first, and
    passes the partial sum of its branch to its parent.

    comm     a communicator
    tensor   this rank's part of the sum; the same shape and dtype on every rank
    dst      the rank that gets the result
    op       "sum", "mean", "max" or "min"
    out      on dst, where to put it; may be tensor itself; None: a new tensor
    work     scratch of one dim, of tensor's dtype and at least tensor.numel() elements, to be used
             again; None: new memory in every call
    returns  the result on dst, None on the others; tensor is left as it is, unless it is out

    Communicates: one message out for every rank but dst, a partial sum; one in from each child.
    Raises InputError for arguments that do not fit.
    """
    name = "binomial_reduce"
    check_payload(name, tensor)
    _check_root(comm, "dst", dst)
    check_reduction(op, tensor.dtype)
    check_out(name, out, tensor.shape, tensor)
    check_apart(name, tensor, out, may_be_same=True)
    held = tensor.detach().reshape(-1)
    parent, children = parent_and_children((comm.rank - dst) % comm.world_size, comm.world_size)
    if children:
        work = scratch(name, work, held.numel(), held)[: held.numel()]
    if out is None or parent is not None:
        needed = tensor.shape if children or parent is None else (0,)
        out = torch.empty(needed, dtype=tensor.dtype, device=tensor.device)
    total = out.detach().view(-1)
    if comm.world_size == 1:
        total.copy_(held)
    for child in reversed(children):
        comm.recv((child + dst) % comm.world_size, TAG, out=work)
        combine(held, work, op, out=total)
        held = total
    if parent is not None:
        comm.send(held, (parent + dst) % comm.world_size, TAG)
        return None
    finish(total, op, comm.world_size)
    return out


def scatter_ring_broadcast(
    comm: Messages, tensor: Tensor, src: int = 0, *, out: Tensor | None = None
) -> Tensor:
    """Give every rank the tensor of one: scatter its parts, then join them with ring_all_gather.

    The scatter halves: who holds some ranks' parts hands the farther half of them to the first of
    those ranks. src sends (w - 1) / w of the tensor, then every rank as much on the ring: together
    about twice the tensor one after the other, where the binomial tree sends it log2 w times. For
    long tensors and many ranks.

    comm     a communicator
    tensor   the same shape and dtype on every rank; only that of src counts
    src      the rank whose tensor it is
    out      where to put it; may be tensor itself; None: a new tensor
    returns  the tensor of src, the same on every rank

    Communicates: the scatter one message in for every rank but src, w - 1 in all; the ring w - 1
    messages out and as many in for every rank. On the ring src gets parts that it has already.
    Raises InputError for arguments that do not fit.
    """
    out, flat = _start("scatter_ring_broadcast", comm, tensor, src, out)
    world_size, place = comm.world_size, (comm.rank - src) % comm.world_size
    ring = [(src + step) % world_size for step in range(world_size)]
    bounds = part_bounds(flat.numel(), world_size)
    distance = largest_power_of_two(world_size)
    while distance:
        near, far = place + distance, min(place + 2 * distance, world_size)
        if place % (2 * distance) == 0 and near < world_size:
            comm.send(flat[bounds[near] : bounds[far]], ring[near], TAG)
        elif place % (2 * distance) == distance:
            end = min(place + distance, world_size)
            comm.recv(ring[place - distance], TAG, out=flat[bounds[place] : bounds[end]])
        distance //= 2
    gather_on_ring(comm, ring, cut(flat, bounds))
    return out


def parent_and_children(place: int, world_size: int) -> tuple[int | None, list[int]]:
    """Return whom a place in the binomial tree hears from in a broadcast, and whom it tells.

    The place joined at the distance of its highest bit; later distances are its children's.

    place       counted from the root, which stands at place 0
    world_size  number of places
    returns     the parent, None for the root; the children, who joined first standing first
    """
    parent = place - largest_power_of_two(place) if place else None
    distances = [1 << bit for bit in range(place.bit_length(), world_size.bit_length())]
    return parent, [place + one for one in distances if place + one < world_size]


def _start(
    name: str, comm: Messages, tensor: Tensor, src: int, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_payload(name, tensor)
    _check_root(comm, "src", src)
    check_out(name, out, tensor.shape, tensor)
    check_apart(name, tensor, out, may_be_same=True)
    if out is None:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if comm.rank == src and out is not tensor:
        out.detach().copy_(tensor.detach())
    return out, out.detach().view(-1)


def _check_root(comm: Messages, name: str, root: int) -> None:
    check_number(name, root, int, 0, comm.world_size - 1)
