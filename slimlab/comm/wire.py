"""How a message says what it is: a header with dtype and shape, before the data or in one with it.

MPI and torch.distributed move bytes between buffers whose size both sides know. Here recv needs to
know nothing, so every message between two ranks begins with a header; a small payload travels in
the same message, a large one in a second, straight from and to its tensor. A receiver that brings a
buffer has its shape and dtype checked too.

The collectives of a runtime need no header. Production programs send shapes only where they change.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from slimlab.comm.report import CommunicationError
from slimlab.config import require

HEADER_BYTES = 128
MAGIC = 0x736C696D6C616231  # "slimlab1": anything else is not one of our messages
MAX_DIMS = HEADER_BYTES // 8 - 3
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128,
)  # fmt: skip


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


def pack(tensor: Tensor, inline_bytes: int) -> tuple[Tensor, bool]:
    """Make the first message of a send.

    tensor        contiguous, on the CPU
    inline_bytes  payloads up to this size travel in the first message
    returns       (header, and the payload if it is small) as uint8 of shape (n,), and whether the
                  payload is in it

    Raises InputError for a dtype or a number of dims that a header cannot say.
    """
    require(
        tensor.dtype in DTYPES and tensor.dim() <= MAX_DIMS,
        f"a tensor of at most {MAX_DIMS} dims and one of the dtypes "
        + ", ".join(str(one).removeprefix("torch.") for one in DTYPES),
        f"{tensor.dtype} with {tensor.dim()} dims",
        "send tensor.view(torch.uint8), or reshape it",
    )
    n_bytes = tensor.numel() * tensor.element_size()
    inline = n_bytes <= inline_bytes
    first = torch.empty(HEADER_BYTES + (n_bytes if inline else 0), dtype=torch.uint8)
    fields = [MAGIC, DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    numbers = torch.tensor(fields + [0] * (HEADER_BYTES // 8 - len(fields)), dtype=torch.int64)
    first[:HEADER_BYTES] = numbers.view(torch.uint8)
    if inline and n_bytes:
        first[HEADER_BYTES:] = as_bytes(tensor)
    return first, inline


def unpack(first: Tensor) -> Described:
    """Read the header of a first message.

    first  uint8 of shape (at least HEADER_BYTES,)

    Raises CommunicationError if it is none.
    """
    numbers = first[:HEADER_BYTES].clone().view(torch.int64).tolist()
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
    out = torch.empty(described.shape, dtype=described.dtype) if out is None else out
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
    require(
        out is None or described.matches(out),
        f"recv: an out for the message from rank {src} with tag {tag}, {described}",
        "" if out is None else f"{str(out.dtype).removeprefix('torch.')} {tuple(out.shape)}",
        "let both ranks agree on the shape, or leave out away",
    )
