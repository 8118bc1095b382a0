"""All_reduce by pairs of ranks: in step s a rank talks to the one whose number differs in one bit.

After log2 w steps everybody has heard of everybody, so these need fewer steps than a ring. They
want a power of two of ranks; those beyond it first hand what they have to one of the others, and
get the result at the end. Chapter 07 draws both.

Thakur, Rabenseifner and Gropp 2005 (Int. J. High Perform. Comput. Appl. 19). Production libraries
(MPICH) choose between these two by length, and pair the ranks left over with neighbours.
"""

from torch import Tensor

from slimlab.comm.collectives_shared import (
    TAG,
    combine,
    finish,
    fold_in,
    fold_out,
    largest_power_of_two,
    part_bounds,
    prepare,
    scratch,
)
from slimlab.comm.messages import Messages


def recursive_doubling_all_reduce(
    comm: Messages,
    tensor: Tensor,
    op: str = "sum",
    *,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """Combine the tensors of all ranks: pairs exchange all they have, at twice the distance each.

    Before step s, every rank holds what 2^s ranks brought together, itself among them; its partner
    at distance 2^s holds the same of the 2^s ranks next to them. Both send all of it, and add. The
    fewest steps that are possible, log2 w, but the whole tensor in each: for short tensors.

    Both partners add the same two partial sums, and both put that of the lower rank first. For
    most numbers that changes nothing, a + b is b + a to the bit; but not for the larger of 0 and
    -0, nor for two different not-a-numbers. With it, all ranks end with the same bits.

    comm     a communicator
    tensor   this rank's part of the sum, any shape; the same shape and dtype on every rank
    op       "sum", "mean", "max" or "min"
    out      where to put the result; may be tensor itself; None: a new tensor
    work     scratch of one dim, of tensor's dtype and at least tensor.numel() elements, to be used
             again; None: new memory in every call
    returns  the result, the same on every rank; tensor is left as it is, unless it is out

    Communicates: with p the largest power of two up to w, log2 p messages of the whole tensor out
    and as many in for each of p ranks; one each way for every rank beyond p and for its helper.
    Raises InputError for arguments that do not fit.
    """
    name = "recursive_doubling_all_reduce"
    out, held, total = prepare(name, tensor, op, out)
    work = scratch(name, work, held.numel(), held)[: held.numel()]
    if comm.world_size == 1:
        total.copy_(held)
    core = largest_power_of_two(comm.world_size)
    held = fold_in(comm, core, held, total, op, work)
    distance = 1
    while comm.rank < core and distance < core:
        partner = comm.rank ^ distance
        comm.sendrecv(held, partner, partner, TAG, out=work)
        first, second = (work, held) if partner < comm.rank else (held, work)
        combine(first, second, op, out=total)
        held = total
        distance *= 2
    if comm.rank < core:
        finish(total, op, comm.world_size)
    fold_out(comm, core, total)
    return out


def rabenseifner_all_reduce(
    comm: Messages,
    tensor: Tensor,
    op: str = "sum",
    *,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """Combine the tensors of all ranks: halve them step by step, then join the parts again.

    Recursive halving: partners at distance p/2, p/4, ..., 1 cut what they still work on into two
    halves. Each sends the half that the other keeps, and adds what it gets to its own. After log2 p
    steps, part r of p is complete on rank r and nowhere else: a reduce_scatter. Recursive doubling
    undoes the steps in reverse: partners exchange what is complete, until everybody has all.

    As many bytes as on a ring, 2 (p - 1) / p of the tensor, in 2 log2 p steps instead of 2 (p - 1).
    Each element is completed on one rank and copied from there, so all ranks end with the same
    bits. Rabenseifner 2004 (ICCS, LNCS 3036).

    comm     a communicator
    tensor   this rank's part of the sum, any shape; the same shape and dtype on every rank
    op       "sum", "mean", "max" or "min"
    out      where to put the result; may be tensor itself; None: a new tensor
    work     scratch of one dim, of tensor's dtype and at least tensor.numel() elements, to be used
             again; None: new memory in every call
    returns  the result, the same on every rank; tensor is left as it is, unless it is out

    Communicates: with p the largest power of two up to w, 2 log2 p messages out and as many in for
    each of p ranks, of p/2, p/4, ..., 1 and 1, 2, ..., p/2 parts; and one of the whole tensor each
    way for every rank beyond p and for its helper.
    Raises InputError for arguments that do not fit.
    """
    name = "rabenseifner_all_reduce"
    out, held, total = prepare(name, tensor, op, out)
    if comm.world_size == 1:
        total.copy_(held)
    core = largest_power_of_two(comm.world_size)
    bounds = part_bounds(held.numel(), core)
    half = held.numel() - bounds[core // 2]
    work = scratch(name, work, held.numel() if comm.world_size > core else half, held)
    held = fold_in(comm, core, held, total, op, work)
    if comm.rank < core:
        _halve(comm, core, bounds, held, total, op, work)
        finish(total[_block(bounds, comm.rank, 1)], op, comm.world_size)
        _double(comm, core, bounds, total)
    fold_out(comm, core, total)
    return out


def _halve(
    comm: Messages, core: int, bounds: list[int], held: Tensor, total: Tensor, op: str, work: Tensor
) -> None:
    distance = core // 2
    while distance:
        partner = comm.rank ^ distance
        kept, given = _block(bounds, comm.rank, distance), _block(bounds, partner, distance)
        arrived = work[: kept.stop - kept.start]
        comm.sendrecv(held[given], partner, partner, TAG, out=arrived)
        combine(held[kept], arrived, op, out=total[kept])
        held = total
        distance //= 2


def _double(comm: Messages, core: int, bounds: list[int], total: Tensor) -> None:
    distance = 1
    while distance < core:
        partner = comm.rank ^ distance
        given, taken = _block(bounds, comm.rank, distance), _block(bounds, partner, distance)
        comm.sendrecv(total[given], partner, partner, TAG, out=total[taken])
        distance *= 2


def _block(bounds: list[int], rank: int, distance: int) -> slice:
    """Return the elements of the `distance` parts that a rank works on at this distance."""
    first = rank - rank % distance
    return slice(bounds[first], bounds[first + distance])
