"""Quantized layers of which every rank has a part: rows, columns, or words of a table.

Chapter 15 runs a slim model on several ranks with them; slimlab.slim.quantize_parallel puts them
into it. A scale belongs to a row or to a group of neighbours in a row, so a part takes its scales
along, and its integers are those of the whole: nothing is quantized again.

Rows cut: each rank has some outputs, and needs nothing from the others. Columns cut: the ranks'
results are added up. Where activations are integers too, the scale of a row of x is that of all its
columns, so the ranks first agree on the largest number (4 bytes per row), and what they add up are
sums of 32 bits: exact, whatever their order. The result is that of one process to the last bit.

Production lets each rank take the scale of its own columns, which saves a message and gives other
numbers for each number of ranks, and adds up in 16-bit floats.
Shoeybi et al. 2019 (arXiv:1909.08053), section 3, for the cuts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlab.comm.base import Communicator
from slimlab.config import require
from slimlab.parallel.tensor_collectives import check_parts, reduce_from_ranks
from slimlab.slim.quantize_layers import (
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    multiply,
)
from slimlab.slim.quantize_maps import Quantized


class RowParallelQuantizedLinear(QuantizedLinear):
    """Some of the columns of a weight-only layer; the ranks' results are added up in floats.

    whole  the layer that is cut; equal on every rank
    group  the ranks that share it

    forward: x (..., I / world_size), a shard, to (..., O), the same on every rank. Adding n
    products in another order moves a sum by at most 2 n u / (1 - n u) times the sum of their sizes,
    u = 2^-24 (Higham 2002, section 3.1): that far it is from one process.

    Communicates: one all_reduce of the result; backward nothing.
    Raises InputError if the columns do not divide, or a rank would have part of a group.
    """

    def __init__(self, whole: QuantizedLinear, group: Communicator):
        part = (group.rank, group.world_size)
        super().__init__(QuantizedWeight(cut_quantized(whole.table.quantized(), 1, part)))
        self.group = group
        self.bias = None if whole.bias is None else whole.bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I / world_size), this rank's inputs, to the sum over all ranks."""
        self._check(x)
        y = F.linear(x.float(), self.table.quantized().dequantize())
        y = reduce_from_ranks(y, self.group, in_place=True)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class RowParallelInt8Linear(Int8Linear):
    """Some of the columns of a layer that multiplies in int8; sums of 32 bits are added up.

    whole  the layer that is cut; equal on every rank. All ranks' sums together fit 32 bits, since
           those of the whole layer do
    group  the ranks that share it

    forward: x (..., I / world_size), a shard, to (..., O), the same on every rank, and the same as
    that of one process bit for bit, but for outliers, which are added up in floats.

    Communicates: with a range per row of x one all_reduce of the rows' maxima (float32) and one of
    the sums (int32); with one range for all one of the sums and one number more, which tells all
    ranks if x is not finite; where the whole layer has outliers one of the result besides.
    Raises InputError if the columns do not divide; with one range for all, on every rank, if some
    rank's x is not finite.
    """

    def __init__(self, whole: Int8Linear, group: Communicator):
        part = (group.rank, group.world_size)
        table = QuantizedWeight(cut_quantized(whole.table.quantized(), 1, part))
        width = table.shape[1]
        start, options = group.rank * width, {}
        if whole.smoothing is not None:
            options["smoothing"] = whole.smoothing[start : start + width].clone()
        if whole.outliers is not None:  # none of them may be here; the ranks' calls stay alike
            here = (whole.outliers >= start) & (whole.outliers < start + width)
            options["outliers"] = whole.outliers[here] - start
            options["outlier_weight"] = whole.outlier_weight[:, here].clone()
        super().__init__(table, whole.bias, input_range=whole.input_range, **options)
        self.group = group
        if whole.row_sums is not None:
            self.row_sums = whole.row_sums.clone()  # of all columns, as the sums are

    def _join(self, found: Tensor, op: str) -> Tensor:
        if op == "max":  # not every runtime's maximum sees NaN; infinity spoils a row as well
            found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)
        return self.group.all_reduce(found, op) if self.group.world_size > 1 else found

    def _static(self, rows: Tensor) -> Tensor:
        num_bad = rows.numel() - int(torch.isfinite(rows).sum())
        sums = multiply(self._shifted(rows.nan_to_num()), self.table.packed)
        told = torch.cat((sums.flatten(), sums.new_tensor([num_bad])))
        told = self._join(told, "sum")
        require(
            int(told[-1]) == 0,
            "finite numbers to quantize",
            f"x: {int(told[-1]):,} are NaN or infinite, on all ranks together",
            "look for the layer in which they came up",
        )
        return self._unshifted(told[:-1].view_as(sums))


class VocabularyParallelQuantizedEmbedding(QuantizedEmbedding):
    """Some words of a quantized table; other ranks have the others.

    table  (V / world_size, D) of this rank
    group  the ranks that share the table; rank r has the ids from r V / world_size on

    forward: ids (B, T), the same on every rank, to (B, T, D) float32, the same on every rank, and
    the same as that of one process: all terms of a sum are 0 but one.

    Communicates: one all_reduce of the result.
    """

    def __init__(self, table: QuantizedWeight, group: Communicator):
        super().__init__(table)
        self.group, self.start = group, group.rank * table.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (B, T) of the whole vocabulary."""
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        rows = super().forward(local.masked_fill(elsewhere, 0))
        rows = rows.masked_fill_(elsewhere[..., None], 0)
        return reduce_from_ranks(rows, self.group, in_place=True)


def cut_rows(
    whole: QuantizedLinear | Int8Linear, part: tuple[int, int]
) -> QuantizedLinear | Int8Linear:
    """Copy some of the outputs of a layer: column-parallel, in the words of the paper.

    whole    the layer that is cut
    part     number of the part, and how many there are
    returns  a layer of the same kind, x (..., I) to (..., O / parts), a shard

    Communicates: nothing.
    Raises InputError if the outputs do not divide.
    """
    table = QuantizedWeight(cut_quantized(whole.table.quantized(), 0, part))
    rows = slice(part[0] * table.shape[0], (part[0] + 1) * table.shape[0])
    return cut_beside(whole, table, rows)


def cut_beside(
    whole: QuantizedLinear | Int8Linear, table: QuantizedWeight, rows: slice
) -> QuantizedLinear | Int8Linear:
    """Make a layer of some rows of a table, with what belongs to them.

    whole    the layer that is cut
    table    its rows of this rank
    rows     their numbers
    returns  a layer of the same kind
    """
    bias = None if whole.bias is None else whole.bias[rows]
    if isinstance(whole, QuantizedLinear):
        return QuantizedLinear(table, bias)
    options = {}
    if whole.smoothing is not None:
        options["smoothing"] = whole.smoothing.clone()
    if whole.outliers is not None:
        options["outliers"] = whole.outliers.clone()
        options["outlier_weight"] = whole.outlier_weight[rows].clone()
    return Int8Linear(table, bias, input_range=whole.input_range, **options)


def cut_quantized(whole: Quantized, dim: int, part: tuple[int, int]) -> Quantized:
    """Copy one of several equal parts of a quantized matrix: its integers, its scales.

    whole    (O, I)
    dim      0 for rows, 1 for columns
    part     number of the part, and how many there are
    returns  a Quantized of its own memory, with the integers that the whole has there

    Raises InputError if the parts do not divide the dim, or would divide a group.
    """
    number, num_parts = part
    check_parts(whole.integers, num_parts, dim)
    size = whole.integers.shape[dim] // num_parts
    group = whole.scheme.quant_group_size
    require(
        dim == 0 or group is None or size % group == 0,
        "groups that a cut leaves whole",
        f"{whole.integers.shape[1]} columns in {num_parts} parts of {size}, groups of {group}",
        "quantize with a quant_group_size that divides each part",
    )
    maps = []
    for one in (whole.scale, whole.zero_point):
        if one is not None and one.shape[dim] > 1:  # else all the parts share it
            num_own = one.shape[dim] // num_parts
            one = one.narrow(dim, number * num_own, num_own)
        maps.append(None if one is None else one.clone())
    integers = whole.integers.narrow(dim, number * size, size)
    integers = integers.clone(memory_format=torch.contiguous_format)
    return Quantized(integers, *maps, whole.scheme)
