"""What the collectives written here share: parts, combining, scratch memory, ranks left over.

Chapter 07 derives the collectives. Production libraries choose parts that fill a packet or a
register, and combine them on the network card or in the switch where these can.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from slimlab.comm.calls import MAX_TAG, check_apart, check_out, check_payload, check_reduction
from slimlab.comm.messages import Messages
from slimlab.config import InputError

# The last tag there is: messages of a program's own, under way at the same time, have others.
TAG = MAX_TAG
COMBINE = {"sum": torch.add, "mean": torch.add, "max": torch.maximum, "min": torch.minimum}


def part_bounds(num_elements: int, num_parts: int) -> list[int]:
    """Cut a length into parts that are as equal as whole numbers allow.

    num_elements  to cut; fewer than num_parts leave some parts empty
    num_parts     how many
    returns       num_parts + 1 bounds: part i goes from number i to number i + 1
    """
    return [num_elements * part // num_parts for part in range(num_parts + 1)]


def cut(flat: Tensor, bounds: Sequence[int]) -> list[Tensor]:
    """Return the parts of a tensor, which share its memory.

    flat    of shape (n,)
    bounds  as from part_bounds
    """
    return [flat[low:high] for low, high in pairwise(bounds)]


def combine(first: Tensor, second: Tensor, op: str, out: Tensor) -> None:
    """Combine two partial results element by element: for "mean" add, the division comes last.

    first   of the shape of all three
    second  what is added behind it
    op      "sum", "mean", "max" or "min"
    out     where to put it; may be first or second
    """
    COMBINE[op](first, second, out=out)


def finish(total: Tensor, op: str, world_size: int) -> None:
    """Turn a complete sum into a mean, if a mean was asked for.

    total       what all ranks' tensors were combined to; changed in place
    op          "sum", "mean", "max" or "min"
    world_size  how many tensors were combined
    """
    if op == "mean":
        total.div_(world_size)


def prepare(
    name: str, tensor: Tensor, op: str, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of an all_reduce and lay them out flat.

    name     of the function
    tensor   this rank's part
    op       "sum", "mean", "max" or "min"
    out      where the result is to go; tensor itself: in its place; None: a new tensor
    returns  the result to fill and return; the tensor as (n,); the result as (n,), which shares the
             result's memory

    Raises InputError.
    """
    check_payload(name, tensor)
    check_reduction(op, tensor.dtype)
    if out is tensor and tensor.is_contiguous():
        flat = tensor.detach().view(-1)
        return out, flat, flat
    check_out(name, out, tensor.shape, tensor)
    check_apart(name, tensor, out, may_be_same=True)
    if out is None:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return out, tensor.detach().reshape(-1), out.detach().view(-1)


def scratch(name: str, work: Tensor | None, num_elements: int, like: Tensor) -> Tensor:
    """Return memory to receive into.

    name          of the function that needs it
    work          what the caller brought, to be used again and again; None: new memory
    num_elements  how many are needed
    like          a tensor of the dtype and on the device that are needed

    Raises InputError for a work that does not fit.
    """
    if work is None:
        return torch.empty(num_elements, dtype=like.dtype, device=like.device)
    fits = work.dim() == 1 and work.numel() >= num_elements and work.is_contiguous()
    if fits and work.dtype == like.dtype and work.device == like.device:
        return work
    raise InputError(
        f"{name}: work, contiguous, {like.dtype}, on {like.device}, one dim of at least "
        f"{num_elements} elements",
        f"{work.dtype}, on {work.device}, shape {tuple(work.shape)}",
        "make it with torch.empty(tensor.numel() + 1, dtype=tensor.dtype), or leave it away",
    )


def largest_power_of_two(limit: int) -> int:
    """Return the largest power of two that is not above a limit.

    limit  at least 1
    """
    return 1 << (limit.bit_length() - 1)


def fold_in(
    comm: Messages, core: int, held: Tensor, total: Tensor, op: str, work: Tensor
) -> Tensor:
    """Let the first `core` ranks hold what all ranks brought, so that they can go on alone.

    Rank core + i hands its tensor to rank i and then waits for the result (fold_out).

    comm     a communicator of at most 2 core ranks
    core     how many ranks go on
    held     this rank's tensor, shape (n,)
    total    where a combined one goes, shape (n,); may be held
    op       "sum", "mean", "max" or "min"
    work     scratch of at least n elements, where a tensor is received
    returns  what this rank holds now: total if it received, else held

    Communicates: one message per rank left over.
    """
    if comm.rank >= core:
        comm.send(held, comm.rank - core, TAG)
    elif comm.rank + core < comm.world_size:
        arrived = comm.recv(comm.rank + core, TAG, out=work[: held.numel()])
        combine(held, arrived, op, out=total)
        return total
    return held


def fold_out(comm: Messages, core: int, total: Tensor) -> None:
    """Give the ranks that were left over the result.

    comm   as in fold_in
    core   as in fold_in
    total  the result, shape (n,): sent below core, received from core on

    Communicates: one message per rank left over.
    """
    if comm.rank >= core:
        comm.recv(comm.rank - core, TAG, out=total)
    elif comm.rank + core < comm.world_size:
        comm.send(total, comm.rank + core, TAG)
