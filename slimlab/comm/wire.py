"""How a message says what it is: a header with dtype and shape, before the data or in one with it.

MPI and torch.distributed move bytes between buffers whose size both sides know. Here recv needs to
know nothing, so every message between two ranks begins with a header; a small payload travels in
the same message, a large one in a second, straight from and to its tensor. A receiver that brings a
buffer has its shape and dtype checked too.

The collectives of a runtime need no header. Production programs send shapes only where they change.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from slimlab.comm.report import CommunicationError
from slimlab.config import InputError

HEADER_BYTES = 128
MAGIC = 0x736C696D6C616231  # "slimlab1": anything else is not one of our messages
MAX_DIMS = HEADER_BYTES // 8 - 3
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128,
)  # fmt: skip
_HEADER = struct.Struct(f"={HEADER_BYTES // 8}q")


@dataclass(frozen=True)
class Described:
    """What a header says.

    dtype    of the payload
    shape    of the payload
    n_bytes  elements times bytes per element
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    n_bytes: int

    def matches(self, out: Tensor) -> bool:
        """Tell whether the payload fits into `out` exactly."""
        return self.dtype == out.dtype and self.shape == tuple(out.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def header_of(tensor: Tensor) -> bytes:
    """Write the header of a message.

    tensor   its payload
    returns  HEADER_BYTES bytes

    Raises InputError for a dtype or a number of dims that a header cannot say.
    """
    dtype, num_dims = tensor.dtype, tensor.dim()
    if dtype not in DTYPES or num_dims > MAX_DIMS:
        raise InputError(
            f"a tensor of at most {MAX_DIMS} dims and one of the dtypes "
            + ", ".join(str(one).removeprefix("torch.") for one in DTYPES),
            f"{dtype} with {num_dims} dims",
            "send tensor.view(torch.uint8), or reshape it",
        )
    padding = (0,) * (MAX_DIMS - num_dims)
    return _HEADER.pack(MAGIC, DTYPES.index(dtype), num_dims, *tensor.shape, *padding)


def read_header(first: bytes | bytearray) -> Described:
    """Read the header of a first message.

    first  at least HEADER_BYTES bytes

    Raises CommunicationError if it is none.
    """
    return _described(_HEADER.unpack_from(first))


def pack(tensor: Tensor, inline_bytes: int) -> tuple[Tensor, bool]:
    """Make the first message of a send.

    tensor        contiguous, on the CPU
    inline_bytes  payloads up to this size travel in the first message
    returns       (header, and the payload if it is small) as uint8 of shape (n,), and whether the
                  payload is in it

    Raises InputError for a dtype or a number of dims that a header cannot say.
    """
    header = torch.frombuffer(bytearray(header_of(tensor)), dtype=torch.uint8)
    if tensor.nbytes > inline_bytes:
        return header, False
    return torch.cat([header, as_bytes(tensor)]), True


def unpack(first: Tensor) -> Described:
    """Read the header of a first message that is a tensor.

    first  uint8 of shape (at least HEADER_BYTES,)

    Raises CommunicationError if it is none.
    """
    return _described(first[:HEADER_BYTES].clone().view(torch.int64).tolist())


def _described(numbers: Sequence[int]) -> Described:
    if numbers[0] != MAGIC or not 0 <= numbers[1] < len(DTYPES) or not 0 <= numbers[2] <= MAX_DIMS:
        raise CommunicationError(
            "a message arrived that was not sent by a communicator of slimlab\n"
            "change: receive with the library that sends, or use another tag"
        )
    dtype, shape = DTYPES[numbers[1]], tuple(numbers[3 : 3 + numbers[2]])
    return Described(dtype, shape, prod(shape) * dtype.itemsize)


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as uint8 of shape (bytes,); shares its memory.

    tensor  contiguous
    """
    return tensor.reshape(-1).view(torch.uint8)


def payload_in(first: Tensor, described: Described, out: Tensor | None) -> Tensor:
    """Take the payload out of a first message that holds it.

    first      uint8, header and payload
    described  what unpack returned
    out        where to put it; None: a new tensor
    """
    if out is None:
        out = torch.empty(described.shape, dtype=described.dtype, device="cpu")
    if described.n_bytes:
        as_bytes(out).copy_(first[HEADER_BYTES : HEADER_BYTES + described.n_bytes])
    return out


def check_fits(described: Described, out: Tensor | None, src: int, tag: int) -> None:
    """Refuse a buffer that a message does not fit into exactly.

    described  what unpack returned
    out        the receiver's buffer, if it brought one
    src        the rank that sent
    tag        of the message

    Raises InputError.
    """
    if out is None or described.matches(out):
        return
    raise InputError(
        f"recv: an out for the message from rank {src} with tag {tag}, {described}",
        f"{str(out.dtype).removeprefix('torch.')} {tuple(out.shape)}",
        "let both ranks agree on the shape, or leave out away",
    )
