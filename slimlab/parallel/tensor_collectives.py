"""Collectives through which gradients flow: what goes out one way comes back by the transpose.

Chapter 09 derives them, slimlab.parallel.tensor_layers is made of them. A collective is a linear
map from what the ranks hold to what they hold afterwards; back-propagation applies the transposed
map to the gradients, and that is another collective:

    forward                                  backward
    copy_to_ranks      nothing is sent       all_reduce
    reduce_from_ranks  all_reduce            nothing is sent
    split_to_ranks     keep the own part     all_gather
    gather_from_ranks  all_gather            keep the own part
    gather_sequence    all_gather            reduce_scatter
    scatter_sequence   reduce_scatter        all_gather

Two kinds of values make the difference. A replicated value is one value that every rank happens to
have; its gradient is the same on every rank, and is counted once. A value of a rank's own (a part,
or a summand of a sum) has a gradient of its own. gather_from_ranks makes a replicated value of
parts, gather_sequence makes of parts a whole that every rank uses in its own way: the same forward
pass, and gradients that differ by the factor world_size if the two are confused.

Production: Megatron-LM's mappings.py has the same six. DTensor finds them from placements: Shard,
Replicate and Partial. Shoeybi et al. 2019 (arXiv:1909.08053), section 3; Korthikanti et al. 2022
(arXiv:2205.05198), section 4.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimlab.comm.base import Communicator
from slimlab.config import require


def copy_to_ranks(x: Tensor, group: Communicator) -> Tensor:
    """Let every rank use a replicated value in its own way, and add up what comes back.

    x        any shape, the same on every rank
    group    the ranks that share the layer
    returns  x; its gradient is the sum of all ranks' gradients, the same on every rank

    Communicates: nothing; backward one all_reduce of the gradient.
    """
    return _Copy.apply(x, group) if group.world_size > 1 else x


def reduce_from_ranks(x: Tensor, group: Communicator, *, in_place: bool = False) -> Tensor:
    """Add up the summands of all ranks; transposes copy_to_ranks.

    x         any shape, this rank's summand
    group     the ranks that share the layer
    in_place  the sum may take the place of x, if x is contiguous and no leaf
    returns   the sum, the same on every rank; its gradient is that of every summand

    Communicates: one all_reduce of x; backward nothing.
    """
    return _Reduce.apply(x, group, in_place) if group.world_size > 1 else x


def split_to_ranks(x: Tensor, group: Communicator, dim: int) -> Tensor:
    """Keep this rank's part of a replicated value.

    x        any shape, the same on every rank
    group    the ranks that share the layer
    dim      the dim that is cut; world_size divides it
    returns  part number rank of x: a shard

    Communicates: nothing; backward one all_gather of the part's gradient.
    Raises InputError if world_size does not divide the dim.
    """
    check_parts(x, group.world_size, dim)
    return _Split.apply(x, group, dim) if group.world_size > 1 else x


def gather_from_ranks(x: Tensor, group: Communicator, dim: int) -> Tensor:
    """Join the parts of all ranks to a replicated value; transposes split_to_ranks.

    What follows must be the same on every rank: only then is the gradient of the whole, of which
    this rank keeps its part, all there is.

    x        any shape, this rank's part: a shard
    group    the ranks that share the layer
    dim      the dim along which the parts are joined
    returns  the whole, the same on every rank

    Communicates: one all_gather of x; backward nothing.
    """
    return _Gather.apply(x, group, dim) if group.world_size > 1 else x


def gather_sequence(x: Tensor, group: Communicator, dim: int = 1) -> Tensor:
    """Join the parts of all ranks to a whole that each rank uses in its own way.

    x        any shape, this rank's part, such as a slice of the positions: a shard
    group    the ranks that share the layer
    dim      the dim along which the parts are joined
    returns  the whole; the gradients of all ranks' wholes are added up, each rank getting its part

    Communicates: one all_gather of x; backward one reduce_scatter of the whole's gradient.
    """
    return _GatherSequence.apply(x, group, dim) if group.world_size > 1 else x


def scatter_sequence(x: Tensor, group: Communicator, dim: int = 1) -> Tensor:
    """Add up the summands of all ranks, each rank getting its part; transposes gather_sequence.

    x        any shape, this rank's summand
    group    the ranks that share the layer
    dim      the dim that is cut; world_size divides it
    returns  part number rank of the sum: a shard

    Communicates: one reduce_scatter of x; backward one all_gather of the part's gradient.
    Raises InputError if world_size does not divide the dim.
    """
    check_parts(x, group.world_size, dim)
    return _ScatterSequence.apply(x, group, dim) if group.world_size > 1 else x


def add_once(x: Tensor, bias: Tensor, group: Communicator, *, in_place: bool = False) -> Tensor:
    """Add a replicated bias to one of the summands, before they are added up.

    All ranks would otherwise add it, and the sum would have it world_size times. Gradients of all
    summands are those of the sum, so every rank finds the bias's whole gradient by itself.

    x         (..., D) this rank's summand
    bias      (D,) the same on every rank
    group     the ranks whose summands reduce_from_ranks or scatter_sequence adds up next
    in_place  the result may take the place of x, if x is no leaf
    returns   x, on rank 0 with the bias

    Communicates: nothing.
    """
    return _AddOnce.apply(x, bias, group.rank == 0, in_place)


def check_parts(x: Tensor, world_size: int, dim: int) -> None:
    """Refuse a dim that the ranks do not divide.

    x           the tensor
    world_size  number of ranks
    dim         of x

    Raises InputError.
    """
    size = x.shape[dim]
    low = size // world_size * world_size
    require(
        size % world_size == 0,
        f"a dim that {world_size} ranks divide",
        f"dim {dim} of {tuple(x.shape)}, {size}, remainder {size % world_size}",
        f"give {f'{low} or ' if low else ''}{low + world_size} there",
    )


def own_part(x: Tensor, group: Communicator, dim: int) -> Tensor:
    """Return a view of this rank's part.

    x      any shape
    group  the ranks that share the layer
    dim    the dim that is cut; world_size divides it
    """
    size = x.shape[dim] // group.world_size
    return x.narrow(dim, group.rank * size, size)


def join_parts(x: Tensor, group: Communicator, dim: int) -> Tensor:
    """Join the parts of all ranks along any dim; no gradient flows through it.

    x        any shape, this rank's part
    group    the ranks that share the layer
    dim      the dim along which the parts are joined
    returns  the whole, contiguous

    Communicates: one all_gather of x.
    """
    dim %= x.dim()
    # A call joins along dim 0. One copy brings the parts beside each other, none if dims before
    # are of size 1.
    whole = group.all_gather(x.contiguous()).view(group.world_size, *x.shape)
    return whole.movedim(0, dim).reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def sum_parts(x: Tensor, group: Communicator, dim: int) -> Tensor:
    """Add up the tensors of all ranks, each rank getting its part along any dim.

    x        any shape; world_size divides the dim
    group    the ranks that share the layer
    dim      the dim that is cut
    returns  this rank's part of the sum, contiguous; no gradient flows through it

    Communicates: one reduce_scatter of x.
    """
    dim %= x.dim()
    parts = x.unflatten(dim, (group.world_size, -1)).movedim(dim, 0).contiguous()
    return group.reduce_scatter(parts).squeeze(0)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Not in place: the same gradient may go to others too, as in x + copy_to_ranks(x).
        return ctx.group.all_reduce(grad.contiguous()), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, in_place):
        if not in_place or x.is_leaf or not x.is_contiguous():
            return group.all_reduce(x.contiguous())
        ctx.mark_dirty(x)  # autograd then notices if somebody needs what was there
        return group.all_reduce(x, out=x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return own_part(x, group, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return join_parts(grad, ctx.group, ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return join_parts(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return own_part(grad, ctx.group, ctx.dim).contiguous(), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return join_parts(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return sum_parts(grad, ctx.group, ctx.dim), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return sum_parts(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return join_parts(grad, ctx.group, ctx.dim), None, None


class _AddOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, here, in_place):
        ctx.bias_shape = bias.shape
        if not in_place or x.is_leaf:
            return x + bias if here else x.clone()
        ctx.mark_dirty(x)
        return x.add_(bias) if here else x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad.reshape(-1, *ctx.bias_shape).sum(0), None, None
