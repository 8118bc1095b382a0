"""Memory as MPI sees it: an address, a type of elements, and a way round for GPU memory.

Chapter 07 uses it through slimlab.comm.mpi. Addresses come from data_ptr(). tensor.numpy() would
give one too, but then torch never resizes that storage again, and sharded training frees a
parameter's memory by resizing it to nothing. Importing this module starts MPI.

torch.distributed's MPI backend passes data_ptr() too; torch must be built from source to have it.
"""

import ctypes
import os
import warnings
from collections.abc import Sequence
from math import prod

import torch
from mpi4py import MPI
from torch import Tensor

from slimlab.config import InputError, require

GPU_VARIABLE = "SLIMLAB_MPI_GPU"
REDUCED = {
    torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE,
    torch.int64: MPI.INT64_T, torch.int32: MPI.INT32_T, torch.int16: MPI.INT16_T,
    torch.int8: MPI.INT8_T, torch.uint8: MPI.UINT8_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX, torch.complex128: MPI.C_DOUBLE_COMPLEX,
}  # fmt: skip
HALVES = (torch.float16, torch.bfloat16)
# What is only moved is told apart by its size; counts of elements stay below 2^31 for longer.
MOVED = {
    1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX
}  # fmt: skip
OPS = {"sum": MPI.SUM, "mean": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}


def memory(tensor: Tensor) -> MPI.buffer:
    """Return the memory of a tensor, for MPI to read or write; whoever asks keeps the tensor alive.

    tensor  contiguous
    """
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)


def reduced(tensor: Tensor) -> list:
    """Describe a tensor whose elements MPI is to combine.

    tensor  contiguous, of a dtype that reduced_dtype returned
    """
    return [memory(tensor), REDUCED[tensor.dtype]]


def reduced_dtype(dtype: torch.dtype) -> torch.dtype:
    """Tell in which dtype MPI combines elements: it has no type for the 16-bit floats.

    dtype    of the tensors
    returns  float32 for float16 and bfloat16, dtype itself otherwise

    Raises InputError for a dtype that MPI cannot combine.
    """
    if dtype in REDUCED:
        return dtype
    if dtype in HALVES:
        return torch.float32
    raise InputError(
        "a dtype that MPI can combine: "
        + ", ".join(str(one).removeprefix("torch.") for one in (*REDUCED, *HALVES)),
        f"{dtype}",
        "convert the tensor first, for instance with .float() or .long()",
    )


def moved(tensor: Tensor, counts: Sequence[int] | None = None) -> list:
    """Describe a tensor that MPI is to move.

    tensor  contiguous, any dtype
    counts  elements of each rank's part, if the parts are uneven
    """
    kind = MOVED[tensor.element_size()]
    return [memory(tensor), kind] if counts is None else [memory(tensor), (counts, None), kind]


def row_of(tensor: Tensor) -> int:
    """Count the elements of one row, that is, of tensor[0].

    tensor  with a first dim
    """
    return prod(tensor.shape[1:])


def counts_of(sizes: Sequence[int], tensor: Tensor) -> list[int]:
    """Return the elements of each rank's part.

    sizes   rows of each
    tensor  with rows like theirs
    """
    return [size * row_of(tensor) for size in sizes]


def form(sizes: Sequence[int], tensor: Tensor) -> tuple[str, list[int] | None]:
    """Choose between the two forms that MPI has of a collective.

    sizes    rows of each rank's part
    tensor   with rows like theirs
    returns  "" and None for equal parts; "v", which its name ends in, and counts for uneven ones
    """
    return ("", None) if len(set(sizes)) == 1 else ("v", counts_of(sizes, tensor))


class Staging:
    """Finds memory that MPI can reach for a tensor: its own, or a copy in the host's.

    direct  kinds of devices whose memory MPI is handed as it is
    """

    def __init__(self, direct: Sequence[str]):
        self.direct = frozenset(direct)
        self._said = False

    def outgoing(
        self, tensor: Tensor, dtype: torch.dtype | None = None, *, inline: bool = False
    ) -> Tensor:
        """Return the tensor, or a copy where MPI could not read it: contiguous.

        tensor  any; not changed
        dtype   that MPI reads; None: the tensor's
        inline  the host reads it, not MPI
        """
        if not self._reaches(tensor.device, inline):
            tensor = tensor.to("cpu", copy=True)
        if dtype is not None:
            tensor = tensor.to(dtype)
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
        _settle(tensor)
        return tensor

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        out: Tensor | None,
        *,
        inline: bool = False,
    ) -> Tensor:
        """Return where a result may be written: out, if that will do, or a new tensor.

        shape   of the result
        dtype   that MPI writes
        device  of the result
        out     where the caller wants it in the end, contiguous; None: anywhere
        inline  the host writes it, not MPI
        """
        if not self._reaches(device, inline):
            return torch.empty(shape, dtype=dtype, device="cpu")
        if out is not None and out.dtype == dtype:
            work = out.detach()
        else:
            work = torch.empty(shape, dtype=dtype, device=device)
        _settle(work)
        return work

    def copy(self, tensor: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Return a copy that MPI may read and write in place, in out if that will do.

        tensor  any; not changed, unless out is its memory
        dtype   that MPI works in
        out     where the caller wants the result in the end; None: anywhere
        """
        if out is None and dtype == tensor.dtype and self._reaches(tensor.device, False):
            work = tensor.clone(memory_format=torch.contiguous_format)
            _settle(work)
            return work
        work = self.empty(tensor.shape, dtype, tensor.device, out)
        if work.data_ptr() != tensor.data_ptr():
            work.copy_(tensor)
            _settle(work)
        return work

    def deliver(
        self, work: Tensor, dtype: torch.dtype, device: torch.device, out: Tensor | None
    ) -> Tensor:
        """Bring a result to where the caller wants it.

        work     what empty or copy returned, after MPI has written it
        dtype    of the result
        device   of the result
        out      where the caller wants it; None: a new tensor
        """
        if out is None:
            return work.to(device, dtype)
        if work.data_ptr() != out.data_ptr():
            out.detach().copy_(work)
        return out

    def _reaches(self, device: torch.device, inline: bool) -> bool:
        if inline:
            return device.type == "cpu" and "cpu" in self.direct
        if device.type not in self.direct and not self._said:
            self._said = True
            warnings.warn(
                f"this MPI cannot reach {device.type} memory: tensors travel through the host's. "
                f"If it can, set {GPU_VARIABLE}=1",
                stacklevel=2,
            )
        return device.type in self.direct


def _settle(tensor: Tensor) -> None:
    if tensor.is_cuda:  # MPI does not wait for kernels that are still to write this memory
        torch.cuda.current_stream(tensor.device).synchronize()


def reachable() -> list[str]:
    """List the kinds of devices whose memory MPI can be handed.

    The variable SLIMLAB_MPI_GPU, 1 or 0, overrides what the library says of itself.

    Raises InputError for another value.
    """
    wish = os.environ.get(GPU_VARIABLE)
    require(
        wish in (None, "0", "1"),
        f"{GPU_VARIABLE}: 1 if this MPI can reach GPU memory, 0 if not",
        f"{GPU_VARIABLE}={wish}",
        "unset it: then the library is asked",
    )
    return ["cpu", "cuda"] if wish == "1" or (wish is None and _reaches_gpus()) else ["cpu"]


def _reaches_gpus() -> bool:
    name = f"MPIX_Query_{'rocm' if torch.version.hip else 'cuda'}_support"
    try:
        return bool(getattr(ctypes.CDLL(MPI.__file__), name)())
    except (AttributeError, OSError):  # an extension that not every MPI has
        return False
