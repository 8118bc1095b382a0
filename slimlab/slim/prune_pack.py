"""A pruned matrix stored in four forms, and read back bit for bit.

Chapter 15 counts their bytes; slimlab.plan.sparse_storage has the formulas. A zero may lose its
sign: -0.0 comes back as 0.0.

Production reads such forms in the kernel that multiplies; here they are for the disk, and a matrix
is unpacked before it is used.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlab.config import check_choice, require
from slimlab.plan.sparse_storage import FORMS
from slimlab.slim.prune_masks import is_two_four
from slimlab.slim.prune_scores import check_weights

INT32_LIMIT = 2**31


def pack_sparse(weight: Tensor, form: str) -> dict[str, Tensor]:
    """Store a matrix in one form.

    weight   (R, C), floating, left as it is
    form     one of slimlab.plan.sparse_storage.FORMS
    returns  name -> tensor, contiguous, on the CPU: "values" and, for "bitmap", "bits" (uint8,
             eight elements a byte, the first in the lowest bit); for "csr" "columns" and
             "row_starts" (int32); for "2:4" "places" (uint8, four kept elements a byte, 2 bits
             each)

    Raises InputError for an unknown form, a tensor that is no finite matrix, one with 2^31 or more
    elements as CSR, and one that breaks the pattern as 2:4.
    """
    check_choice("form", form, FORMS)
    check_weights({"weight": weight})
    require(
        weight.dim() == 2,
        "a matrix (R, C)",
        f"weight {tuple(weight.shape)}",
        "flatten all dims but the first",
    )
    return PACK[form](weight.detach().cpu().contiguous())


def unpack_sparse(packed: Mapping[str, Tensor], form: str, shape: tuple[int, int]) -> Tensor:
    """Read a matrix back.

    packed   from pack_sparse
    form     the form it was packed in
    shape    (R, C)
    returns  (R, C), on the CPU

    Raises InputError for an unknown form, or tensors that are not of this form and shape.
    """
    check_choice("form", form, FORMS)
    names = NAMES[form]
    require(
        len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape),
        "the shape (R, C) of a matrix",
        f"{tuple(shape)}",
        "give the shape of the matrix that was packed",
    )
    require(
        set(packed) == set(names),
        f'the tensors of form "{form}": {", ".join(names)}',
        ", ".join(packed) or "none",
        "give the form that the matrix was packed in",
    )
    expected = _packed_sizes(packed, form, shape)
    found = {name: packed[name].numel() for name in names}
    require(
        found == expected,
        f'a "{form}" of shape {tuple(shape)}: elements {expected}',
        f"elements {found}",
        "give the shape of the matrix that was packed",
    )
    return UNPACK[form](packed, shape)


def counted_bytes(packed: Mapping[str, Tensor]) -> int:
    """Count the bytes of the tensors that exist.

    packed  from pack_sparse
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


def _pack_csr(weight: Tensor) -> dict[str, Tensor]:
    require(
        weight.numel() < INT32_LIMIT,
        "fewer than 2^31 elements, which int32 can count",
        f"{weight.numel()} elements",
        "pack parts of the rows, or use a bitmap",
    )
    kept = weight != 0
    starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
    columns = kept.nonzero()[:, 1]
    return {
        "values": weight[kept],
        "columns": columns.to(torch.int32),
        "row_starts": starts.to(torch.int32),
    }


def _unpack_csr(packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    weight = packed["values"].new_zeros(shape)
    rows = torch.arange(shape[0]).repeat_interleave(packed["row_starts"].diff().long())
    weight[rows, packed["columns"].long()] = packed["values"]
    return weight


def _pack_bitmap(weight: Tensor) -> dict[str, Tensor]:
    kept = weight != 0
    return {"values": weight[kept], "bits": _join_bits(kept.flatten(), 1)}


def _unpack_bitmap(packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    kept = _split_bits(packed["bits"], 1, prod(shape)).bool().view(shape)
    return packed["values"].new_zeros(shape).masked_scatter_(kept, packed["values"])


def _pack_two_four(weight: Tensor) -> dict[str, Tensor]:
    require(
        is_two_four(weight),
        "a matrix with at most two of every four neighbours in a row not zero",
        f"weight {tuple(weight.shape)} with others",
        "prune with slimlab.slim.prune_masks.two_four_mask, or choose another form",
    )
    fours = weight.reshape(-1, 4)
    # Sorted by "is zero", in order: first what is not zero, then as many zeros as it takes.
    places = (fours == 0).int().argsort(dim=1, stable=True)[:, :2].sort(dim=1).values
    return {"values": fours.gather(1, places).flatten(), "places": _join_bits(places.flatten(), 2)}


def _unpack_two_four(packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    values = packed["values"].view(-1, 2)
    places = _split_bits(packed["places"], 2, values.numel()).long().view(-1, 2)
    fours = values.new_zeros(len(values), 4)
    return fours.scatter_(1, places, values).view(shape)


def _join_bits(numbers: Tensor, num_bits: int) -> Tensor:
    """Pack small numbers (n,) into ceil(n * num_bits / 8) bytes, the first in the lowest bits."""
    per_byte = 8 // num_bits
    padded = F.pad(numbers.to(torch.uint8), (0, -len(numbers) % per_byte)).view(-1, per_byte)
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8)
    return (padded << shifts).sum(1, dtype=torch.uint8)


def _split_bits(packed: Tensor, num_bits: int, count: int) -> Tensor:
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8)
    return ((packed[:, None] >> shifts) & (2**num_bits - 1)).flatten()[:count]


def _packed_sizes(
    packed: Mapping[str, Tensor], form: str, shape: tuple[int, int]
) -> dict[str, int]:
    n_all, n_values = prod(shape), packed["values"].numel()
    if form == "dense":
        return {"values": n_all}
    if form == "bitmap":
        bits = _split_bits(packed["bits"], 1, n_all)
        return {"values": int(bits.sum()), "bits": -(-n_all // 8)}
    if form == "csr":
        return {"values": n_values, "columns": n_values, "row_starts": shape[0] + 1}
    return {"values": n_all // 2, "places": -(-n_all // 8)}


PACK = {
    "dense": lambda weight: {"values": weight.clone()},
    "bitmap": _pack_bitmap,
    "csr": _pack_csr,
    "2:4": _pack_two_four,
}
UNPACK = {
    "dense": lambda packed, shape: packed["values"].reshape(shape).clone(),
    "bitmap": _unpack_bitmap,
    "csr": _unpack_csr,
    "2:4": _unpack_two_four,
}
NAMES = {
    "dense": ("values",),
    "bitmap": ("values", "bits"),
    "csr": ("values", "columns", "row_starts"),
    "2:4": ("values", "places"),
}
