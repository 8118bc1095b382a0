"""Context parallelism: each rank has some positions of every sequence; keys travel round a ring.

Chapter 09 explains it. All but attention works on each position alone, so a rank needs nothing from
others there. In attention its queries meet the keys and values of all ranks one after the other:
each rank passes on what it got, and folds what it sees into an online softmax, as tiled attention
does with tiles (slimlab.model.tiled). No rank ever has all keys. In the backward pass keys and
values go round once more, and their gradients with them, until those are home.

With a causal mask, ranks that hold the end of a text have more to do than those with its beginning.
In the order "zigzag" rank r holds chunks r and 2 w - 1 - r of 2 w, and all have equally much.

Production: Megatron-LM's context parallelism, torch's context_parallel; their kernels also start
the next exchange while they compute, as here, and skip what a mask hides, as here.
Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889), section 3; zigzag after Brandon et al. 2023
(arXiv:2311.09431), who balance the work in stripes.
"""

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import check_choice, check_size, require
from slimlab.model.checks import check_attention
from slimlab.model.masks import causal_mask
from slimlab.model.tiled import tiled_backward, tiled_forward

ORDERS = ("contiguous", "zigzag")
KEYS, GRADIENTS = 0, 1  # tags


def context_positions(
    seq_len: int, *, rank: int, world_size: int, order: str = "contiguous"
) -> Tensor:
    """Return the positions that a rank holds of every sequence.

    seq_len     T, tokens of the whole sequence
    rank        which rank
    world_size  number of ranks
    order       "contiguous": one piece; "zigzag": one from the beginning, one from the end
    returns     (T / world_size,) int64: cut with ids[:, positions], hand to the model as positions

    Raises InputError if the pieces do not divide the sequence.
    """
    check_size("seq_len", seq_len)
    pieces = _pieces(rank, world_size, order)
    num_pieces = len(pieces) * world_size
    low = seq_len // num_pieces * num_pieces
    require(
        seq_len % num_pieces == 0,
        f"seq_len that {num_pieces} pieces divide, {len(pieces)} per rank",
        f"seq_len = {seq_len}, remainder {seq_len % num_pieces}",
        f"pad or cut the sequences to {f'{low} or ' if low else ''}{low + num_pieces}",
    )
    length = seq_len // num_pieces
    return torch.cat([torch.arange(at * length, (at + 1) * length) for at in pieces])


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    comm: Communicator,
    *,
    causal: bool = False,
    order: str = "contiguous",
    scale: float | None = None,
) -> Tensor:
    """Attend to the keys of all ranks.

    query    (B, H, T/w, E) float32 or float64, of the positions that context_positions gives
    key      (B, K, T/w, E), K divides H
    value    (B, K, T/w, Ev)
    comm     of the w ranks that share the sequences; same shapes on all
    causal   hide later positions
    order    as in context_positions, the same on every rank
    scale    factor on the scores, 1/sqrt(E) if not given
    returns  (B, H, T/w, Ev) of the same positions, a shard; differentiable once

    Communicates: w - 1 messages of this rank's size of keys and values; backward as many, and w
    with their gradients.
    Raises InputError, before it communicates, for shapes and dtypes that do not fit, and if a
    message has another shape than this rank's own.
    """
    check_choice("order", order, ORDERS)
    check_attention(query, key, value, None, scale)
    pieces = len(_pieces(0, comm.world_size, order))
    length = query.shape[-2]
    require(
        query.dim() == 4 and length == key.shape[-2] and length % pieces == 0,
        f"query (B, H, T/w, E), key and value of the same positions, in {pieces} pieces",
        f"query {tuple(query.shape)}, key {tuple(key.shape)}",
        "cut the sequences by context_positions; keys of another text need no ring",
    )
    autocast = torch.is_autocast_enabled(query.device.type)
    require(
        query.dtype in (torch.float32, torch.float64) and not autocast,
        "query, key and value in float32 or float64, outside of autocast",
        f"{query.dtype}" + ", inside of autocast" * autocast,
        "convert them with .float(): the sums run over the keys of all ranks",
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return RingAttention.apply(query, key, value, comm, causal, order, scale)


class RingAttention(torch.autograd.Function):
    """Tie the two walks round the ring together; saves its inputs, output and logsumexp."""

    @staticmethod
    def forward(ctx, query, key, value, comm, causal, order, scale):
        """Walk once round the ring.

        ctx, query, key, value, comm, causal, order, scale  as in ring_attention
        """
        output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_full((*query.shape[:-1], 1), -torch.inf)
        for source, keys, values in _visitors(comm, key, value):
            for mine, theirs, mask in _meetings(query, comm, source, causal, order):
                given = query[..., mine, :], keys[..., theirs, :], values[..., theirs, :], mask
                part, weight = tiled_forward(*given, scale, keys.shape[-2])
                _fold(output[..., mine, :], logsumexp[..., mine, :], part, weight)
        ctx.comm, ctx.causal, ctx.order, ctx.scale = comm, causal, order, scale
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        """Walk round once more, and send the gradients of keys and values all the way home.

        ctx          what forward saved
        grad_output  (B, H, T/w, Ev)

        Raises InputError if these gradients are to be differentiated (create_graph=True).
        """
        require(
            not torch.is_grad_enabled(),
            "the gradient of ring attention, once",
            "a gradient that is to be differentiated again (create_graph=True)",
            'use scaled_dot_product_attention(..., form="explicit") in one process there',
        )
        query, key, value, output, logsumexp = ctx.saved_tensors
        comm, widths = ctx.comm, (key.shape[-1], value.shape[-1])
        grad_query, grads = torch.zeros_like(query), torch.zeros_like(torch.cat((key, value), -1))
        for source, keys, values in _visitors(comm, key, value):
            grad_keys, grad_values = grads.split(widths, -1)
            for mine, theirs, mask in _meetings(query, comm, source, ctx.causal, ctx.order):
                given = query[..., mine, :], keys[..., theirs, :], values[..., theirs, :], mask
                found = output[..., mine, :], logsumexp[..., mine, :], ctx.scale, keys.shape[-2]
                parts = tiled_backward(grad_output[..., mine, :], *given, *found)
                grad_query[..., mine, :] += parts[0]
                grad_keys[..., theirs, :] += parts[1]
                grad_values[..., theirs, :] += parts[2]
            if comm.world_size > 1:
                grads = comm.sendrecv(grads, *_neighbours(comm), GRADIENTS)
        return grad_query, *grads.split(widths, -1), None, None, None, None


def _pieces(rank: int, world_size: int, order: str) -> tuple[int, ...]:
    # Zigzag: the sooner the first piece, the later the second, so that the work is the same.
    check_choice("order", order, ORDERS)
    return (rank,) if order == "contiguous" else (rank, 2 * world_size - 1 - rank)


def _neighbours(comm: Communicator) -> tuple[int, int]:
    return (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size


def _visitors(comm: Communicator, key: Tensor, value: Tensor):
    """Yield each rank with its keys and values, this one first; the next ones are on their way."""
    widths, here = (key.shape[-1], value.shape[-1]), torch.cat((key, value), dim=-1)
    after, before = _neighbours(comm)
    for step in range(comm.world_size):
        last = step == comm.world_size - 1
        started = None if last else (comm.isend(here, after, KEYS), comm.irecv(before, KEYS))
        yield (comm.rank - step) % comm.world_size, *here.split(widths, dim=-1)
        if started:
            started[0].wait()
            there = started[1].wait()
            require(
                there.shape == here.shape,
                f"keys and values of one shape on all ranks, {tuple(here.shape)} together",
                f"{tuple(there.shape)} from rank {before}",
                "cut the sequences by context_positions",
            )
            here = there


def _meetings(query: Tensor, comm: Communicator, source: int, causal: bool, order: str):
    """Yield which of the own positions meet which of a rank's, and the mask of those that do."""
    whole = slice(0, query.shape[-2])
    if not causal:
        yield whole, whole, None
        return
    mine, theirs = (_pieces(rank, comm.world_size, order) for rank in (comm.rank, source))
    length = query.shape[-2] // len(mine)
    cut = [slice(at * length, (at + 1) * length) for at in range(len(mine))]
    for query_piece, query_slice in zip(mine, cut):
        for key_piece, key_slice in zip(theirs, cut):
            if key_piece <= query_piece:
                same = key_piece == query_piece
                mask = causal_mask(length, device=query.device) if same else None
                yield query_slice, key_slice, mask


def _fold(output: Tensor, logsumexp: Tensor, part: Tensor, weight: Tensor) -> None:
    """Fold the result of some more keys into that of those before; both are softmax averages."""
    both = torch.logaddexp(logsumexp, weight)
    output.mul_(torch.exp(logsumexp - both)).add_(part * torch.exp(weight - both))
    logsumexp.copy_(both)
