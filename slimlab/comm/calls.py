"""What a call asks for: its name and arguments, the checks of its arguments, a handle to wait on.

Two ranks fit together in a collective if their Calls are equal. The same Call stands in the tables
that say who waits in what, so that a reader sees what the runtime compared.

Production libraries compare calls only on request (TORCH_DISTRIBUTED_DEBUG=DETAIL), MPI never.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from slimlab.comm.counts import Counts
from slimlab.comm.report import Position, frames_of, line_at, position_of, short_group
from slimlab.config import InputError, require

REDUCTIONS = ("sum", "mean", "max", "min")
MAX_TAG = 2**20


class Call(NamedTuple):
    """What a rank asks for.

    name       of the method
    arguments  as they stand in tables; equal on all ranks of a collective
    source     (src, tag) of a recv, src a rank of the world
    target     (dst, tag) of a send that may have to wait, dst a rank of the world
    group      the ranks of the world that the call is among; None: all
    """

    name: str
    arguments: str = ""
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    group: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.name}({self.arguments})"
        return text if self.group is None else f"{text} in group {short_group(self.group)}"


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

        returns  of irecv, all_reduce and all_gather the tensor, of isend None
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result


def kind_of(tensor: Tensor) -> str:
    """Describe a payload as tables show it: dtype, shape, and the device unless it is the CPU.

    tensor  any
    """
    kind = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
    return kind if tensor.is_cpu else f"{kind} on {tensor.device.type}"


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as tables show it.

    dtype  any
    """
    return str(dtype).removeprefix("torch.")


def check_payload(call: str, tensor: object) -> None:
    """Refuse what is not a dense tensor.

    call    name of the method
    tensor  what it was given

    Raises InputError.
    """
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
        return
    raise InputError(
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
    if isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag <= MAX_TAG:
        return
    raise InputError(
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
        "op: one of sum, mean, max, min",
        f"op = {op!r}",
        "choose one of these names",
    )
    whole = not (dtype.is_floating_point or dtype.is_complex)
    undefined = dtype == torch.bool or (op == "mean" and whole)
    undefined = undefined or (op in ("max", "min") and dtype.is_complex)
    if not undefined:
        return
    raise InputError(
        f"a dtype that has a {op}",
        f"op = {op!r} of {dtype}",
        "convert the tensor first, for instance with .float() or .long()",
    )


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
    fits = out.shape == tuple(shape) and out.dtype == like.dtype and out.is_contiguous()
    if fits and out.device.type == like.device.type:
        return
    raise InputError(
        f"{call}: out, contiguous, {dtype_name(like.dtype)} {tuple(shape)}",
        kind_of(out) + ("" if out.is_contiguous() else ", not contiguous"),
        "leave out away for a new tensor, or make it with torch.empty(shape, dtype=...)",
    )


def check_timeout(timeout_s: float) -> None:
    """Refuse a time limit that is none.

    timeout_s  as whoever starts ranks gives it

    Raises InputError.
    """
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not (number and 0 < timeout_s <= threading.TIMEOUT_MAX):
        raise InputError(
            "timeout_s: a positive number of seconds",
            f"timeout_s = {timeout_s!r}",
            "a program that waits for ever is ended, so it needs a limit; 60 is the default",
        )


def check_apart(call: str, tensor: Tensor, out: Tensor | None, *, may_be_same: bool) -> None:
    """Refuse an out that shares memory with the argument.

    call         name of the method
    tensor       what it is to read
    out          what it is to write; None: a new tensor
    may_be_same  out may be tensor itself, but no other view of its memory

    Raises InputError.
    """
    if out is None or out.is_meta or not (tensor.numel() and out.numel()):
        return
    if may_be_same and out is tensor:
        return
    start, end = _memory(tensor)
    its_start, its_end = _memory(out)
    same = may_be_same and start == its_start and tensor.stride() == out.stride()
    if same or end <= its_start or its_end <= start:
        return
    raise InputError(
        f"{call}: an out " + "that is the tensor itself, or one " * may_be_same + "apart from it",
        "an out that overlaps the tensor",
        "leave out away for a new tensor",
    )


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the one behind its last."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (span + 1) * tensor.element_size()


class Progress:
    """Where one rank stands, for whoever watches it: the call that it is in, if any.

    call       the call that it is in, or None while it computes
    since_s    time.monotonic() when it went in or came out
    num_calls  how many it has begun
    started    the handles that were not waited for, with what was started and the line that did
    counts     how many messages and collectives it has begun and done
    """

    def __init__(self):
        self.call: Call | None = None
        self.since_s, self.num_calls = time.monotonic(), 0
        self.started: dict[Handle, tuple[Call, Position | None]] = {}
        self.counts = Counts()

    def inside(self, call: Call) -> "Inside":
        """Note that the rank is in a call, for the length of a with block.

        call  what it asks for
        """
        return Inside(self, call)

    def start(self, call: Call, finish: Callable[[], Tensor | None]) -> Handle:
        """Make the handle of a call that has been started, and keep it until it was waited for.

        call     what was started
        finish   what waits for it
        returns  a handle that waits inside of Call("wait"), for tables to show
        """
        if self.call is None:
            self.counts.start(call)
        waits_in = call._replace(name="wait", arguments=f"{call.name}({call.arguments})")

        def wait() -> Tensor | None:
            del self.started[handle]
            with self.inside(waits_in):
                return finish()

        handle = Handle(wait)
        self.started[handle] = call, position_of(frames_of(sys._getframe()))
        return handle

    def unwaited(self) -> list[str]:
        """List the calls that were started and never waited for, with their lines."""
        return [f"{call}, started at {line_at(where)}" for call, where in self.started.values()]


class Inside:
    """A with block in which a rank is in a call.

    progress  of the rank
    call      what it asks for

    Production code would use contextlib's generator, which takes longer than a small message.
    """

    def __init__(self, progress: Progress, call: Call):
        self._progress, self._call = progress, call

    def __enter__(self) -> None:
        progress = self._progress
        self._outer, progress.call = progress.call, self._call
        progress.num_calls += 1
        progress.since_s = time.monotonic()
        if self._outer is None:
            progress.counts.begin(self._call)

    def __exit__(self, kind: type | None, error: object, traceback: object) -> None:
        progress = self._progress
        # A message that does not fit where it was to go has been taken all the same.
        refused = kind is InputError and self._call.source is not None
        if self._outer is None and (kind is None or refused):
            progress.counts.end(self._call)
        progress.call, progress.since_s = self._outer, time.monotonic()
