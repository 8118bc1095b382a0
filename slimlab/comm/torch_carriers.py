"""What carries tensors under torch.distributed: one of its backends, gloo or NCCL.

Chapter 07 uses it through slimlab.comm.distributed. What torch says when a connection is lost is
said again here in words of the program: which rank, in which call.

Production programs call torch.distributed's functions, which add checks and records of their own,
and read its errors as they are.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from slimlab.comm.calls import Call, Progress
from slimlab.comm.report import CommunicationError, RanksTimeoutError
from slimlab.comm.torch_links import Link
from slimlab.comm.torch_lookout import Lookout
from slimlab.comm.torch_memory import delivered, plain, space_for
from slimlab.comm.wire import as_bytes

OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
LATE = ("imed out", "imeout")
LOST = ("losed by peer", "reset by peer", "roken pipe", "onnection refused", "ead error")


class Carrier:
    """One backend of torch.distributed for one group. A call starts, and wait waits for it.

    All calls but wait raise CommunicationError if the backend has failed, RanksTimeoutError if it
    gave up, and so does wait. Tensors are contiguous.

    backend    torch's own
    rank       this rank, in the world
    progress   the call that this rank is in
    timeout_s  after which the backend gives up
    lookout    looks after started receives while the rank waits; None: only wait
    """

    def __init__(
        self,
        backend: dist.Backend,
        rank: int,
        progress: Progress,
        timeout_s: float,
        lookout: Lookout | None = None,
    ):
        self._open_backend, self._rank, self.lookout = backend, rank, lookout
        self._progress, self._timeout_s = progress, timeout_s

    def wait(self, work: dist.Work) -> None:
        """Wait for what has been started; on a GPU, let its current stream wait.

        work  what a call returned
        """
        if self.lookout is None:
            self._try(work.wait)
        else:
            self._try(self.lookout.wait, work.wait)

    def close(self) -> None:
        """Let the backend go; calls raise CommunicationError from now on."""
        self._open_backend = None

    def send(self, data: Tensor, dst: int, tag: int) -> dist.Work:
        """Start to send, with gloo.

        data  in the host's memory
        dst   the rank of the group that receives
        tag   of the message
        """
        return self._try(self._backend.send, [data], dst, tag)

    def recv(self, data: Tensor, src: int, tag: int) -> dist.Work:
        """Start to receive, with gloo.

        data  in the host's memory; a message may be shorter, but not longer
        src   the rank of the group that sends
        tag   of the message
        """
        return self._try(self._backend.recv, [data], src, tag)

    def broadcast(self, data: Tensor, src: int) -> dist.Work:
        """Start a broadcast in place.

        data  uint8
        src   the rank of the group whose data it is
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        return self._try(self._backend.broadcast, [data], options)

    def all_reduce(self, data: Tensor, op: str) -> dist.Work:
        """Start an all_reduce in place.

        data  of a dtype that reduced_dtype returned
        op    "sum", "max" or "min"; "mean" is taken for the sum
        """
        options = dist.AllreduceOptions()
        options.reduceOp = OPS[op]
        return self._try(self._backend.allreduce, [_real(data)], options)

    def reduce(self, data: Tensor, dst: int, op: str) -> dist.Work:
        """Start a reduce in place; other ranks than dst are left with data of no use.

        data  of a dtype that reduced_dtype returned
        dst   the rank of the group that gets the result
        op    as in all_reduce
        """
        options = dist.ReduceOptions()
        options.rootRank, options.rootTensor, options.reduceOp = dst, 0, OPS[op]
        return self._try(self._backend.reduce, [_real(data)], options)

    def reduce_scatter(self, part: Tensor, whole: Tensor, op: str) -> dist.Work:
        """Start a reduce_scatter with equal parts, with NCCL.

        part   where this rank's is to go, of a dtype that reduced_dtype returned
        whole  all parts
        op     as in all_reduce
        """
        options = dist.ReduceScatterOptions()
        options.reduceOp = OPS[op]
        return self._try(self._backend._reduce_scatter_base, _real(part), _real(whole), options)

    def all_gather(self, whole: Tensor, part: Tensor) -> dist.Work:
        """Start an all_gather of equal parts, with NCCL.

        whole  uint8, where all parts are to go
        part   uint8, this rank's; may be its place in the whole
        """
        return self._try(self._backend._allgather_base, whole, part)

    def exchange(
        self, whole: Tensor, parts: Tensor, recv_bytes: list[int], send_bytes: list[int]
    ) -> dist.Work:
        """Start an all_to_all.

        whole       uint8, where the ranks' parts are to go
        parts       uint8, what goes to the ranks
        recv_bytes  from each rank
        send_bytes  to each rank
        """
        options = dist.AllToAllOptions()
        return self._try(self._backend.alltoall_base, whole, parts, recv_bytes, send_bytes, options)

    @property
    def _backend(self) -> dist.Backend:
        if self._open_backend is None:
            raise CommunicationError(
                f"rank {self._rank} uses a communicator that is closed\n"
                "change: let a program end its communication before close()"
            )
        return self._open_backend

    def _try(self, method: Callable, *arguments: object) -> dist.Work:
        try:
            return method(*arguments)
        except CommunicationError:  # from a receive that was looked after
            raise
        except RuntimeError as error:
            raise in_words(error, self._rank, self._progress.call, self._timeout_s) from error


class Carriers:
    """What carries one rank's tensors within its group.

    gloo     for the host's memory
    direct   the same, that only waits: for other threads, and for what has come already
    nccl     for GPUs; None: their tensors go through the host's memory

    link      how the rank reaches the others of the group
    rank      this rank, in the world
    progress  the call that this rank is in
    lookout   of this rank
    """

    def __init__(self, link: Link, rank: int, progress: Progress, lookout: Lookout):
        end, self.link = (rank, progress, link.timeout_s), link
        self.gloo, self.direct = Carrier(link.gloo, *end, lookout), Carrier(link.gloo, *end)
        self.nccl = None if link.nccl is None else Carrier(link.nccl, *end)

    def close(self) -> None:
        """Let all backends go, and wait until their threads have ended.

        A thread of gloo's that freed a tensor while Python ends would end the process by an error.
        """
        self.link = None
        for one in (self.gloo, self.direct, self.nccl):
            if one is not None:
                one.close()

    def near(self, tensor: Tensor) -> Tensor:
        """Return the tensor, or a copy in the host's memory if nothing can carry it.

        tensor  any
        """
        return tensor if tensor.is_cuda and self.nccl is not None else tensor.cpu()

    def of(self, near: Tensor) -> Carrier:
        """Return what carries a tensor.

        near  what the method of this name returned
        """
        return self.nccl if near.is_cuda else self.gloo

    def all_gather(self, whole: Tensor, sizes: list[int], rank: int) -> list[dist.Work]:
        """Start to bring every rank's part into the whole.

        whole  where all parts are to go; this rank's is there already. What near returned
        sizes  rows of each part
        rank   this rank, in the group
        """
        carrier, parts = self.of(whole), [as_bytes(part) for part in whole.split(sizes)]
        if whole.is_cuda and whole.numel() and len(set(sizes)) == 1:
            return [carrier.all_gather(as_bytes(whole), parts[rank])]
        return [carrier.broadcast(one, src) for src, one in enumerate(parts) if one.numel()]

    def exchange(
        self, tensor: Tensor, send_sizes: list[int], recv_sizes: list[int], out: Tensor | None
    ) -> Tensor:
        """Send each rank its part, and join the parts from all.

        tensor      parts for all ranks, one behind the other
        send_sizes  rows for each rank
        recv_sizes  rows from each rank
        out         where to put them; None: a new tensor

        Communicates: one all_to_all of the tensor.
        """
        row_bytes = prod(tensor.shape[1:]) * tensor.element_size()
        whole = space_for(tensor, (sum(recv_sizes), *tensor.shape[1:]), out)
        near, parts = self.near(whole), self.near(plain(tensor))
        carrier = self.of(near)
        sizes = [[size * row_bytes for size in some] for some in (recv_sizes, send_sizes)]
        carrier.wait(carrier.exchange(as_bytes(near), as_bytes(parts), *sizes))
        return delivered(near, whole, out)


def on_its_stream(tensor: Tensor, start: Callable) -> Callable:
    """Let a call follow the stream that a GPU's tensor is computed on, whichever thread starts it.

    tensor   of the call
    start    starts it
    returns  start, or what calls it with this thread's present stream of the tensor's GPU
    """
    if not tensor.is_cuda:
        return start
    stream = torch.cuda.current_stream(tensor.device)

    def start_there():
        with torch.cuda.stream(stream):
            return start()

    return start_there


def in_words(
    error: RuntimeError, rank: int, call: Call | None, timeout_s: float
) -> CommunicationError:
    """Say in words of the program what torch said in its own.

    error      what torch raised
    rank       the rank that met it, in the world
    call       that it was in
    timeout_s  after which torch gives up
    """
    text = str(error)
    ends = () if call is None else (call.source, call.target)
    others = sorted({end[0] for end in ends if end is not None})
    other = f"rank {' or '.join(map(str, others))}" if others else "another rank"
    where = f"rank {rank} was in {call}" if call else f"rank {rank} had started a collective"
    if any(sign in text for sign in LATE):
        return RanksTimeoutError(
            f"{where} and gave up after {timeout_s:g} s\n"
            f"it may be that {other} is in another call or still computes\n"
            "change: let the ranks meet in the same calls, or give a larger timeout_s"
        )
    if any(sign in text for sign in LOST):
        return CommunicationError(
            f"{where}, and the connection to {other} was lost\n"
            "it may be that this rank raised an error, was killed, or left before the others\n"
            "change: look first at what that rank says"
        )
    return CommunicationError(f"{where}, and torch.distributed failed: {text}")


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
