"""Tensors as torch.distributed's backends want them: contiguous, and of a dtype that they combine.

Chapter 07 uses it through slimlab.comm.distributed. The functions of a communicator return new
tensors, the backends work in place: here are the copies, and none that is not needed.

Production programs call the backends in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.config import InputError

REDUCED = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.complex64, torch.complex128,
)  # fmt: skip


def reduced_dtype(dtype: torch.dtype) -> torch.dtype:
    """Tell in which dtype elements are combined.

    dtype    of the tensors
    returns  int32 for int16, which no backend knows; dtype itself otherwise

    Raises InputError for a dtype that cannot be combined.
    """
    if dtype in REDUCED:
        return dtype
    if dtype == torch.int16:
        return torch.int32
    raise InputError(
        "a dtype that gloo and NCCL can combine: int16, "
        + ", ".join(str(one).removeprefix("torch.") for one in REDUCED),
        f"{dtype}",
        "convert the tensor first, for instance with .float() or .long()",
    )


def copy_of(tensor: Tensor, out: Tensor | None) -> Tensor:
    """Return a contiguous copy, in out if there is one.

    tensor  any
    out     where it is to go, or tensor itself; None: a new tensor
    """
    copy = space_for(tensor, tensor.shape, out)
    if copy.data_ptr() != tensor.data_ptr():
        copy.copy_(tensor)
    return copy


def space_for(tensor: Tensor, shape: Sequence[int], out: Tensor | None) -> Tensor:
    """Return a tensor to write a result to: out if there is one.

    tensor  whose dtype and device the result has
    shape   of the result
    out     where it is to go; None: a new tensor
    """
    if out is not None:
        return out.detach()
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values in order: itself, or a copy.

    tensor  any
    """
    return tensor.resolve_conj().resolve_neg().contiguous()


def delivered(found: Tensor, space: Tensor, out: Tensor | None) -> Tensor:
    """Bring a result to where the caller wants it.

    found  the result, perhaps of another dtype or on another device
    space  what space_for returned
    out    what the caller gave; None: nothing
    """
    if found.data_ptr() != space.data_ptr():
        space.copy_(found)
    return space if out is None else out
