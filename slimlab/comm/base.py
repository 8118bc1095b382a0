"""The Communicator: all that a parallel program may ask of its surroundings.

A parallel program is a function `program(comm, ...)`. Each rank runs it with a communicator of its
own, which knows the rank, the number of ranks, and how to move tensors between them. What carries
the tensors is a runtime's business: threads of one process (slimlab.comm.threads) are the first.

A runtime writes the methods that begin with an underscore. Checks and bookkeeping happen here,
once for all runtimes: every call notes its payload in the rank's ledger.

Chapter 00 sends the first message, chapter 07 explains every call. Names are torch.distributed's.
Production libraries also reduce in place, overlap communication with computation, and choose the
algorithm by size; payload is what a call is handed, not what crosses each link.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlab.comm.report import text_table
from slimlab.config import require

REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(frozen=True)
class LedgerEntry:
    """One finished call of one rank.

    call     "send", "recv", "all_reduce" or "barrier"
    n_bytes  payload: elements times bytes per element
    dtype    of the payload; None for a barrier
    shape    of the payload; None for a barrier
    peer     rank sent to or received from; None for a collective
    """

    call: str
    n_bytes: int
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    peer: int | None


class PayloadLedger:
    """The calls of one rank, in the order in which they finished, with their payload in bytes.

    A send counts what was handed over, a recv what came back: over all ranks a message stands in
    two ledgers, so ask for "send" to count it once. An all_reduce counts its argument once,
    whatever its algorithm moves.
    """

    def __init__(self):
        self.entries: list[LedgerEntry] = []

    def add(self, call: str, tensor: Tensor | None = None, peer: int | None = None) -> None:
        """Note a finished call.

        call    its name
        tensor  its payload
        peer    the other rank, if there is one
        """
        if tensor is None:
            self.entries.append(LedgerEntry(call, 0, None, None, peer))
        else:
            n_bytes = tensor.numel() * tensor.element_size()
            shape = tuple(tensor.shape)
            self.entries.append(LedgerEntry(call, n_bytes, tensor.dtype, shape, peer))

    def total_bytes(self, call: str | None = None) -> int:
        """Add up the payload.

        call  only calls of this name; all if not given
        """
        return sum(entry.n_bytes for entry in self._chosen(call))

    def num_calls(self, call: str | None = None) -> int:
        """Count the calls.

        call  only calls of this name; all if not given
        """
        return len(self._chosen(call))

    def table(self) -> str:
        """List the names of the calls with their number and payload, one line each."""
        names = dict.fromkeys(entry.call for entry in self.entries)
        rows = [(name, self.num_calls(name), f"{self.total_bytes(name):,}") for name in names]
        return text_table(("call", "calls", "bytes"), rows)

    def _chosen(self, call: str | None) -> list[LedgerEntry]:
        return [entry for entry in self.entries if call in (None, entry.call)]


class Communicator(ABC):
    """One rank's connection to the others.

    rank        this rank, from 0 to world_size - 1
    world_size  number of ranks
    ledger      what this rank's calls were handed

    Tensors travel as data: gradients do not flow through a call.
    """

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self.ledger = PayloadLedger()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size})"

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send a copy of a tensor to another rank.

        tensor  any shape, this rank's own
        dst     the rank that receives
        tag     tells messages to the same rank apart

        Communicates: one message. A program must not count on send to return before the message
        is received: runtimes differ in this.
        Raises InputError for a payload that is no tensor, a dst that is no other rank, a bad tag.
        """
        _check_payload("send", tensor)
        self._check_peer("dst", dst)
        _check_tag(tag)
        self._send(tensor.detach(), dst, tag)
        self.ledger.add("send", tensor, peer=dst)

    def recv(self, src: int, tag: int = 0) -> Tensor:
        """Wait for a message from another rank.

        src      the rank that sends
        tag      only a message with this tag; those of one tag arrive in the order of sending
        returns  the tensor that was sent, this rank's own

        Communicates: one message.
        Raises InputError for a src that is no other rank, and for a bad tag.
        """
        self._check_peer("src", src)
        _check_tag(tag)
        tensor = self._recv(src, tag)
        self.ledger.add("recv", tensor, peer=src)
        return tensor

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Combine the tensors of all ranks, element by element.

        tensor   this rank's part; the same shape and dtype on every rank
        op       "sum", "mean", "max" or "min"
        returns  a new tensor, the same on every rank; the argument stays as it was

        Communicates: one all_reduce of the tensor. All ranks must call it.
        Raises InputError for an unknown op, or one that the dtype does not have.
        """
        _check_payload("all_reduce", tensor)
        _check_reduction(op, tensor.dtype)
        result = self._all_reduce(tensor.detach(), op)
        self.ledger.add("all_reduce", tensor)
        return result

    def barrier(self) -> None:
        """Wait until every rank has come here.

        Communicates: no payload. All ranks must call it.
        """
        self._barrier()
        self.ledger.add("barrier")

    @abstractmethod
    def _send(self, tensor: Tensor, dst: int, tag: int) -> None: ...

    @abstractmethod
    def _recv(self, src: int, tag: int) -> Tensor: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    def _check_peer(self, name: str, peer: int) -> None:
        others = [str(rank) for rank in range(self.world_size) if rank != self.rank]
        whole = isinstance(peer, int) and not isinstance(peer, bool)
        require(
            whole and 0 <= peer < self.world_size,
            f"{name}: a rank from 0 to {self.world_size - 1}",
            f"{name} = {peer!r} on rank {self.rank} of {self.world_size}",
            "for a ring use (comm.rank + 1) % comm.world_size",
        )
        require(
            peer != self.rank,
            f"{name}: another rank than oneself",
            f"{name} = {peer} on rank {self.rank}",
            f"use one of {', '.join(others)}; a rank has its own data already, and on some "
            "runtimes a message to itself waits for ever"
            if others
            else "start more than one rank",
        )


def reduce_in_rank_order(tensors: Sequence[Tensor], op: str) -> Tensor:
    """Combine one tensor per rank, in the order of the ranks.

    Floating sums depend on their order; with the order fixed, every run gives the same bits.

    tensors  one per rank, same shape and dtype
    op       "sum", "mean", "max" or "min"
    returns  a new tensor
    """
    total = tensors[0].clone(memory_format=torch.contiguous_format)
    for tensor in tensors[1:]:
        if op in ("sum", "mean"):
            total += tensor
        else:
            total = torch.maximum(total, tensor) if op == "max" else torch.minimum(total, tensor)
    return total / len(tensors) if op == "mean" else total


def _check_payload(call: str, tensor: object) -> None:
    require(
        isinstance(tensor, Tensor) and tensor.layout == torch.strided,
        f"{call}: a dense tensor",
        f"a {type(tensor).__name__}"
        + (f" of layout {tensor.layout}" if isinstance(tensor, Tensor) else ""),
        "wrap numbers in torch.tensor(...); send a list's tensors one by one",
    )


def _check_tag(tag: object) -> None:
    require(
        isinstance(tag, int) and not isinstance(tag, bool) and tag >= 0,
        "tag: a whole number of at least 0",
        f"tag = {tag!r}",
        "leave tag out unless two messages must be told apart",
    )


def _check_reduction(op: object, dtype: torch.dtype) -> None:
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
