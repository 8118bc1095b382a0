"""Messages between two ranks: send, recv, their started forms, and both at once.

Chapter 07 explains them. Names are torch.distributed's; unlike there, recv needs no buffer, since a
message says of what shape and dtype it is.

Production libraries leave that out: both sides must know it, and a wrong guess is an error at best.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from slimlab.comm.calls import (
    Call,
    Handle,
    Progress,
    check_apart,
    check_payload,
    check_tag,
    kind_of,
)
from slimlab.comm.ledger import PayloadLedger
from slimlab.config import InputError, require


class Messages(ABC):
    """What one rank needs to talk to another; slimlab.comm.base.Communicator adds collectives.

    rank        this rank, from 0 to world_size - 1
    world_size  number of ranks
    ranks       the ranks of the world that belong, in the order of their rank here: all of them,
                unless this came from split
    backend     "threads", "mpi", "gloo" or "nccl"
    device      where this rank's tensors best lie
    ledger      what this rank's calls were handed
    progress    the call that this rank is in
    """

    backend = "?"
    device = torch.device("cpu")

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        ranks: tuple[int, ...] | None = None,
        ledger: PayloadLedger | None = None,
        progress: Progress | None = None,
    ):
        self.rank, self.world_size = rank, world_size
        self.ranks = tuple(range(world_size)) if ranks is None else ranks
        self.ledger = PayloadLedger() if ledger is None else ledger
        self.progress = Progress() if progress is None else progress
        self._group = ranks

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
        self._check_send("send", tensor, dst, tag)
        call = self._call_send("send", tensor, dst, tag)
        with self.progress.inside(call):
            self._send(call, tensor.detach(), dst, tag)
        self._note("send", tensor, dst)

    def recv(self, src: int, tag: int = 0, *, out: Tensor | None = None) -> Tensor:
        """Wait for a message from another rank.

        src      the rank that sends
        tag      only a message with this tag; those of one tag arrive in the order of sending
        out      where to put it: contiguous, of the message's shape and dtype; None: a new tensor
        returns  the tensor that was sent, this rank's own; out, if given

        Communicates: one message.
        Raises InputError for a src that is no other rank, a bad tag, an out that does not fit.
        """
        self._check_recv("recv", src, tag, out)
        call = self._call_recv("recv", src, tag)
        with self.progress.inside(call):
            tensor = self._recv(call, src, tag, out)
        self._note("recv", tensor, src)
        return tensor

    def isend(self, tensor: Tensor, dst: int, tag: int = 0) -> Handle:
        """Start to send; as send, but return at once.

        tensor   any shape, this rank's own; it must not change before the handle was waited for
        dst      the rank that receives
        tag      tells messages to the same rank apart
        returns  a handle whose wait returns None

        Communicates: one message.
        Raises InputError as send does.
        """
        self._check_send("isend", tensor, dst, tag)
        call = self._call_send("isend", tensor, dst, tag)
        with self.progress.inside(call):
            handle = self._isend(call, tensor.detach(), dst, tag)
        self._note("send", tensor, dst)
        return self.progress.start(call, handle.wait)

    def irecv(self, src: int, tag: int = 0, *, out: Tensor | None = None) -> Handle:
        """Start to receive; as recv, but return at once.

        src      the rank that sends
        tag      only a message with this tag; receives of one tag get messages in the order in
                 which they were begun, whichever is waited for first
        out      where to put it; it must not be used before the handle was waited for
        returns  a handle whose wait returns the tensor

        Communicates: one message, which stands in the ledger once it was waited for.
        Raises InputError as recv does; for an out that does not fit, when it is waited for.
        """
        self._check_recv("irecv", src, tag, out)
        call = self._call_recv("irecv", src, tag)
        with self.progress.inside(call):
            handle = self._irecv(call, src, tag, out)

        def finish() -> Tensor:
            tensor = handle.wait()
            self._note("recv", tensor, src)
            return tensor

        return self.progress.start(call, finish)

    def sendrecv(
        self, tensor: Tensor, dst: int, src: int, tag: int = 0, *, out: Tensor | None = None
    ) -> Tensor:
        """Send to one rank and receive from another at the same time, without a deadlock.

        tensor   what goes to dst; must not share memory with out
        dst      the rank that receives
        src      the rank that sends; may be the same as dst
        tag      of both messages
        out      where to put what arrives; None: a new tensor
        returns  the tensor from src, this rank's own

        Communicates: one message out, one in.
        Raises InputError as send and recv do.
        """
        self._check_send("sendrecv", tensor, dst, tag)
        self._check_recv("sendrecv", src, tag, out)
        check_apart("sendrecv", tensor, out, may_be_same=False)
        arguments = f"dst={dst}, src={src}, tag={tag}, {kind_of(tensor)}"
        source, target = (self.ranks[src], tag), (self.ranks[dst], tag)
        call = Call("sendrecv", arguments, source, target, self._group)
        with self.progress.inside(call):
            received = self._sendrecv(call, tensor.detach(), dst, src, tag, out)
        self._note("send", tensor, dst)
        self._note("recv", received, src)
        return received

    @abstractmethod
    def _send(self, call: Call, tensor: Tensor, dst: int, tag: int) -> None: ...

    @abstractmethod
    def _recv(self, call: Call, src: int, tag: int, out: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _isend(self, call: Call, tensor: Tensor, dst: int, tag: int) -> Handle: ...

    @abstractmethod
    def _irecv(self, call: Call, src: int, tag: int, out: Tensor | None) -> Handle: ...

    def _sendrecv(
        self, call: Call, tensor: Tensor, dst: int, src: int, tag: int, out: Tensor | None
    ) -> Tensor:
        sent = self._isend(call, tensor, dst, tag)
        received = self._recv(call, src, tag, out)
        sent.wait()
        return received

    def _call(self, name: str, arguments: str = "") -> Call:
        return Call(name, arguments, None, None, self._group)

    def _note(self, name: str, tensor: Tensor | None = None, peer: int | None = None) -> None:
        self.ledger.add(name, tensor, peer, self._group)

    def _call_send(self, name: str, tensor: Tensor, dst: int, tag: int) -> Call:
        arguments = f"dst={dst}, tag={tag}, {kind_of(tensor)}"
        return Call(name, arguments, None, (self.ranks[dst], tag), self._group)

    def _call_recv(self, name: str, src: int, tag: int) -> Call:
        return Call(name, f"src={src}, tag={tag}", (self.ranks[src], tag), None, self._group)

    def _check_send(self, name: str, tensor: Tensor, dst: int, tag: int) -> None:
        check_payload(name, tensor)
        self._check_peer("dst", dst)
        check_tag(tag)

    def _check_recv(self, name: str, src: int, tag: int, out: Tensor | None) -> None:
        self._check_peer("src", src)
        check_tag(tag)
        if out is not None:
            check_payload(f"{name}: out", out)
            if out.is_contiguous():
                return
            raise InputError(
                f"{name}: a contiguous out",
                f"a tensor of shape {tuple(out.shape)} and strides {out.stride()}",
                "make it with torch.empty(shape, dtype=...), or leave out away",
            )

    def _check_peer(self, name: str, peer: int) -> None:
        whole = isinstance(peer, int) and not isinstance(peer, bool)
        if whole and 0 <= peer < self.world_size and peer != self.rank:
            return
        require(
            whole and 0 <= peer < self.world_size,
            f"{name}: a rank from 0 to {self.world_size - 1}",
            f"{name} = {peer!r} on rank {self.rank} of {self.world_size}",
            "for a ring use (comm.rank + 1) % comm.world_size",
        )
        others = [str(rank) for rank in range(self.world_size) if rank != self.rank]
        require(
            peer != self.rank,
            f"{name}: another rank than oneself",
            f"{name} = {peer} on rank {self.rank}",
            f"use one of {', '.join(others)}; a rank has its own data already, and on some "
            "runtimes a message to itself waits for ever"
            if others
            else "start more than one rank",
        )
