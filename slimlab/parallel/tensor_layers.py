"""Layers whose weights are cut: by columns, by rows, by words of the vocabulary.

Chapter 09 derives them. In y = x W^T, written with nn.Linear's weight (O, I), a column-parallel
layer has some of the O outputs and needs all of x; a row-parallel layer has some of the I inputs
and gives a summand of y. One behind the other, with a function of single elements between them,
they need one sum at the end and, for the gradient of x, one at the beginning. ("Column" and "row"
are those of the matrix W^T that stands to the right of x, as in the paper.)

Each layer is made from the whole one and keeps a copy of its part, so that the whole can be freed;
names of the parameters stay. slimlab.parallel.tensor puts them into a model.

Production: Megatron-LM's layers of the same names, which draw each part by itself, add up the
gradient of the input while that of the weight is computed, and gather the sequence anew in the
backward pass instead of keeping it. Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.comm.base import Communicator
from slimlab.parallel.tensor_collectives import (
    add_once,
    check_parts,
    copy_to_ranks,
    reduce_from_ranks,
    scatter_sequence,
)


class ColumnParallelLinear(nn.Linear):
    """Some of the outputs of a linear layer.

    whole         the layer that is cut; equal on every rank
    group         the ranks that share it
    part          which part this rank has, and of how many; None: rank and world_size. Where there
                  are fewer parts than ranks, somebody must add up the copies' gradients
    copies_input  the layer adds up the gradient of its input; False: whoever calls has done
                  copy_to_ranks or gather_sequence, once for several layers of the same input

    weight (O / parts, I), bias (O / parts,): shards. forward: x (..., I), whole, to (..., O /
    parts), a shard of the whole layer's output.

    Communicates: forward nothing, backward one all_reduce of x's gradient if copies_input.
    Raises InputError if the outputs do not divide.
    """

    def __init__(
        self,
        whole: nn.Linear,
        group: Communicator,
        *,
        part: tuple[int, int] | None = None,
        copies_input: bool = True,
    ):
        part = (group.rank, group.world_size) if part is None else part
        weight = cut_parameter(whole.weight, 0, part)
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.group, self.copies_input, self.weight = group, copies_input, weight
        self.bias = None if whole.bias is None else cut_parameter(whole.bias, 0, part)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I), the same on every rank, to this rank's outputs."""
        if self.copies_input:
            x = copy_to_ranks(x, self.group)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """Some of the inputs of a linear layer; the ranks' results are added up.

    whole              the layer that is cut; equal on every rank
    group              the ranks that share it
    sequence_parallel  leave each rank a slice of the sum's positions (dim 1) instead of all

    weight (O, I / world_size): a shard; bias (O,): replicated, and added by one rank alone, since
    the sum would have it world_size times. forward: x (..., I / world_size), a shard such as a
    column-parallel layer gives, to (..., O), the same on every rank.

    Communicates: forward one all_reduce of the result, backward nothing; with sequence_parallel one
    reduce_scatter of the result, backward one all_gather of the slice's gradient.
    Raises InputError if the inputs do not divide.
    """

    def __init__(self, whole: nn.Linear, group: Communicator, *, sequence_parallel: bool = False):
        weight = cut_parameter(whole.weight, 1, (group.rank, group.world_size))
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.group, self.sequence_parallel, self.weight = group, sequence_parallel, weight
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I / world_size), this rank's inputs, to the sum over all ranks."""
        y = F.linear(x, self.weight)
        if self.bias is not None:
            y = add_once(y, self.bias, self.group, in_place=True)
        if self.sequence_parallel:
            return scatter_sequence(y, self.group)
        return reduce_from_ranks(y, self.group, in_place=True)


class VocabularyParallelEmbedding(nn.Embedding):
    """The vectors of some words of the vocabulary; other ranks have the others.

    whole  the table that is cut; equal on every rank
    group  the ranks that share it

    weight (V / world_size, D): a shard; rank r has the ids from start = r V / world_size on.
    forward: ids (B, T), the same on every rank, to (B, T, D), the same on every rank: each rank
    looks up what it has, and a sum brings them together, one term of which is not zero.

    Communicates: one all_reduce of the result; backward nothing.
    Raises InputError if the vocabulary does not divide.
    """

    def __init__(self, whole: nn.Embedding, group: Communicator):
        weight = cut_parameter(whole.weight, 0, (group.rank, group.world_size))
        super().__init__(*weight.shape, device="meta")
        self.group, self.weight = group, weight
        self.start = group.rank * weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (B, T) of the whole vocabulary."""
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill_(elsewhere[..., None], 0)
        return reduce_from_ranks(rows, self.group, in_place=True)


def cut_parameter(whole: nn.Parameter, dim: int, part: tuple[int, int]) -> nn.Parameter:
    """Copy one of several equal parts of a parameter.

    whole    any shape
    dim      the dim that is cut
    part     number of the part, and how many there are
    returns  a parameter of its own memory, frozen if the whole one is

    Raises InputError if the parts do not divide the dim.
    """
    number, num_parts = part
    check_parts(whole, num_parts, dim)
    size = whole.shape[dim] // num_parts
    own = whole.detach().narrow(dim, number * size, size)
    own = own.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(own, requires_grad=whole.requires_grad)
