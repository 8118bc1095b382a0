"""What a call asks for: its name and arguments, the checks of its arguments, a handle to wait on.

Two ranks fit together in a collective if their Calls are equal. The same Call stands in the tables
that say who waits in what, so that a reader sees what the runtime compared.

Production libraries compare calls only on request (TORCH_DISTRIBUTED_DEBUG=DETAIL), MPI never.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlab.config import require

REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(frozen=True)
class Call:
    """What a rank asks for.

    name       of the method
    arguments  as they stand in tables; equal on all ranks of a collective
    source     (src, tag) of a recv
    target     (dst, tag) of a send that may have to wait
    """

    name: str
    arguments: str = ""
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})"


class Handle:
    """A call that has been started and may not have finished.

    finish  called once, by the first wait: waits, and returns what wait is to return

    Every handle must be waited for, and its tensors left alone until then.
    """

    def __init__(self, finish: Callable[[], Tensor | None]):
        self._finish: Callable[[], Tensor | None] | None = finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor | None:
        """Wait until the call has finished; a second wait returns the same at once.

        returns  of irecv and all_reduce the tensor, of isend None
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result


def kind_of(tensor: Tensor) -> str:
    """Describe a payload as tables show it: dtype, shape, and the device unless it is the CPU.

    tensor  any
    """
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    return kind if tensor.device.type == "cpu" else f"{kind} on {tensor.device.type}"


def check_payload(call: str, tensor: object) -> None:
    """Refuse what is not a dense tensor.

    call    name of the method
    tensor  what it was given

    Raises InputError.
    """
    require(
        isinstance(tensor, Tensor) and tensor.layout == torch.strided,
        f"{call}: a dense tensor",
        f"a {type(tensor).__name__}"
        + (f" of layout {tensor.layout}" if isinstance(tensor, Tensor) else ""),
        "wrap numbers in torch.tensor(...); send a list's tensors one by one",
    )


def check_tag(tag: object) -> None:
    """Refuse a tag that is not a whole number of at least 0, and of at most 2^20.

    tag  what was given

    Raises InputError.
    """
    require(
        isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag <= 2**20,
        "tag: a whole number from 0 to 2^20",
        f"tag = {tag!r}",
        "leave tag out unless two messages must be told apart",
    )


def check_reduction(op: object, dtype: torch.dtype) -> None:
    """Refuse an unknown op, and one that the dtype does not have.

    op     "sum", "mean", "max" or "min"
    dtype  of the tensors to combine

    Raises InputError.
    """
    require(
        op in REDUCTIONS,
        f"op: one of {', '.join(REDUCTIONS)}",
        f"op = {op!r}",
        "choose one of these names",
    )
    whole = not (dtype.is_floating_point or dtype.is_complex)
    undefined = dtype == torch.bool or (op == "mean" and whole)
    undefined = undefined or (op in ("max", "min") and dtype.is_complex)
    require(
        not undefined,
        f"a dtype that has a {op}",
        f"op = {op!r} of {dtype}",
        "convert the tensor first, for instance with .float() or .long()",
    )


def check_rows(call: str, tensor: Tensor) -> None:
    """Refuse a tensor without a first dim to cut or to join along.

    call    name of the method
    tensor  its payload

    Raises InputError.
    """
    require(
        tensor.dim() > 0,
        f"{call}: a tensor with at least one dim, along which parts are joined",
        "a tensor of shape ()",
        "write tensor.reshape(1)",
    )


def check_sizes(call: str, sizes: Sequence[int], world_size: int, total: int | None) -> list[int]:
    """Check the sizes of the ranks' parts along dim 0.

    call        name of the method
    sizes       one whole number of at least 0 per rank
    world_size  number of ranks
    total       what they must add up to; None: anything
    returns     the sizes as a list

    Raises InputError.
    """
    sizes = list(sizes)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes)
    require(
        len(sizes) == world_size and whole,
        f"{call}: sizes of {world_size} parts, one per rank, whole numbers of at least 0",
        f"{sizes}",
        "give every rank the same list, in rank order",
    )
    require(
        total is None or sum(sizes) == total,
        f"{call}: sizes that add up to the {total} rows of the tensor",
        f"{sizes}, together {sum(sizes)}",
        "let the sizes add up to tensor.shape[0]",
    )
    return sizes


def equal_sizes(call: str, num_rows: int, world_size: int) -> list[int]:
    """Return the sizes of equal parts along dim 0.

    call        name of the method
    num_rows    rows to divide
    world_size  number of ranks

    Raises InputError if the rows do not divide.
    """
    require(
        num_rows % world_size == 0,
        f"{call}: a number of rows (dim 0) that {world_size} ranks divide",
        f"{num_rows} rows",
        "pad the tensor, or give sizes=[...] with one number of rows per rank",
    )
    return [num_rows // world_size] * world_size


def check_out(call: str, out: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """Refuse an out that the result does not fit into exactly.

    call   name of the method
    out    where the result is to go; None: a new tensor
    shape  of the result
    like   a tensor with the result's dtype and device

    Raises InputError.
    """
    if out is None:
        return
    check_payload(f"{call}: out", out)
    fits = tuple(out.shape) == tuple(shape) and out.dtype == like.dtype
    require(
        fits and out.device.type == like.device.type and out.is_contiguous(),
        f"{call}: out, contiguous, {str(like.dtype).removeprefix('torch.')} {tuple(shape)}",
        kind_of(out) + ("" if out.is_contiguous() else ", not contiguous"),
        "leave out away for a new tensor, or make it with torch.empty(shape, dtype=...)",
    )


def short_sizes(sizes: Sequence[int]) -> str:
    """Write sizes as tables show them.

    sizes  rows per rank
    """
    sizes = list(sizes)
    if len(set(sizes)) <= 1:
        return f"{sizes[0]} each"
    return str(sizes)


class Progress:
    """Where one rank stands, for whoever watches it: the call that it is in, if any.

    call       the call that it is in, or None while it computes
    since_s    time.monotonic() when it went in or came out
    num_calls  how many it has begun
    """

    def __init__(self):
        self.call: Call | None = None
        self.since_s, self.num_calls = time.monotonic(), 0

    @contextmanager
    def inside(self, call: Call) -> Iterator[None]:
        """Note that the rank is in a call, for the length of a with block.

        call  what it asks for
        """
        outer, self.call = self.call, call
        self.num_calls += 1
        self.since_s = time.monotonic()
        try:
            yield
        finally:
            self.call, self.since_s = outer, time.monotonic()
