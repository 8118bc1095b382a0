"""Messages over gloo: a header, with the payload behind it if that is small, else in a second one.

Chapter 07 uses it through slimlab.comm.distributed; slimlab.comm.wire says what stands in a header.
A large payload goes straight from and to its tensor. gloo tells messages apart by tag, so headers
and payloads have tags of their own: if several receives have been started, headers arrive in the
order of sending, and payloads are asked for in the order of their headers.

gloo moves nothing before the receiver has asked for it: a send waits for its recv however small the
message is, so that every deadlock of two sends shows. Tensors on a GPU travel through the host's
memory. NCCL could carry them, but it knows no tags, and a transfer that has been started keeps all
later ones between the same two ranks waiting: two ranks that both start to send and then receive
would wait for ever, unless both transfers are handed over at once. Production pipelines arrange
their messages so that this can be done (torch.distributed.batch_isend_irecv).
"""

from collections import deque

import torch
from torch import Tensor

from slimlab.comm.calls import Handle
from slimlab.comm.torch_carriers import Carriers
from slimlab.comm.wire import (
    HEADER_BYTES,
    Described,
    as_bytes,
    check_fits,
    pack,
    payload_in,
    unpack,
)

# Up to here copying twice takes less time than a second message, measured on one machine.
INLINE_BYTES = 16384
# Programs have tags up to 2^20.
GATHER_TAG, SCATTER_TAG, TEXT_TAG = range(2**20 + 1, 2**20 + 4)
HOST = torch.device("cpu")


class Port:
    """Where the messages of one communicator leave and arrive.

    carriers  of the group
    rank      this rank in the group
    ranks     of the world, in the order of their rank in the group
    device    where new tensors are to lie
    """

    def __init__(self, carriers: Carriers, rank: int, ranks: tuple[int, ...], device: torch.device):
        self.gloo, self.direct = carriers.gloo, carriers.direct
        self.rank, self.ranks, self.device = rank, ranks, device

    def isend(self, tensor: Tensor, dst: int, tag: int) -> Handle:
        """Start to send.

        tensor   this rank's
        dst      the rank that receives
        tag      of the message
        returns  a handle, which keeps what gloo reads
        """
        payload = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        first, inline = pack(payload, INLINE_BYTES)
        kept = [(first, self.gloo.send(first, dst, 2 * tag))]
        if not inline:
            data = as_bytes(payload)
            kept.append((data, self.gloo.send(data, dst, 2 * tag + 1)))

        def finish() -> None:
            for _, work in kept:
                self.gloo.wait(work)
            kept.clear()

        return Handle(finish)

    def irecv(self, src: int, tag: int, out: Tensor | None) -> "Incoming":
        """Start to receive.

        src      the rank that sends
        tag      of the message
        out      where to put it; None: a new tensor
        returns  what has been started
        """
        queues, key = self.gloo.lookout.queues, (self, src, tag)
        if key not in queues:
            queues[key] = IncomingQueue(self, src, tag)
        return queues[key].add(out)

    def texts(self, text: str) -> list[str]:
        """Give every rank the text of each.

        text     this rank's, not empty
        returns  in rank order

        Communicates: one message from each rank to each.
        """
        others = [rank for rank in range(len(self.ranks)) if rank != self.rank]
        incoming = {rank: self.irecv(rank, TEXT_TAG, None) for rank in others}
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sent = [self.isend(data, rank, TEXT_TAG) for rank in others]
        texts = {rank: bytes(one.finish(HOST).tolist()) for rank, one in incoming.items()}
        for handle in sent:
            handle.wait()
        texts[self.rank] = text.encode()
        return [texts[rank].decode() for rank in sorted(texts)]


class IncomingQueue:
    """The receives of one address that have been started and whose header has not been read.

    port  of the communicator
    src   the rank that sends
    tag   of the messages
    """

    def __init__(self, port: Port, src: int, tag: int):
        self.port, self.src, self.tag, self.watched = port, src, tag, False
        self._incoming: deque[Incoming] = deque()

    def add(self, out: Tensor | None) -> "Incoming":
        """Start one more.

        out  where to put the message; None: a new tensor
        """
        self._incoming.append(Incoming(self, out))
        return self._incoming[-1]

    def look(self) -> None:
        """Go on with those whose header has come."""
        while self._incoming and self._incoming[0].has_come():
            self.port.direct.wait(self._incoming[0].header)
            self._open_first()

    def wait_for_first(self) -> None:
        """Wait for the first header, and begin to receive a payload of its own."""
        self.watched = True
        try:
            self.port.gloo.wait(self._incoming[0].header)
        finally:
            self.watched = False
        self._open_first()

    def _open_first(self) -> None:
        self._incoming.popleft().open()
        if not self._incoming:
            del self.port.gloo.lookout.queues[self.port, self.src, self.tag]


class Incoming:
    """A receive that has been started.

    queue  of its address
    out    where the caller wants the tensor; None: a new one
    """

    def __init__(self, queue: IncomingQueue, out: Tensor | None):
        self._queue, self._out = queue, out
        # gloo lets a message be shorter than the memory that it is to fill.
        self._first = torch.empty(HEADER_BYTES + INLINE_BYTES, dtype=torch.uint8)
        self._first[0] = 0
        self.header = queue.port.gloo.recv(self._first, queue.src, 2 * queue.tag)
        self._described: Described | None = None
        self._host = self._payload = None

    def has_come(self) -> bool:
        """Tell whether the header has come, or begins to: gloo only tells those who wait."""
        return self._first[0].item() != 0

    def open(self) -> None:
        """Read the header, which has come, and begin to receive a payload of its own."""
        out, gloo = self._out, self._queue.port.gloo
        self._described = described = unpack(self._first)
        if described.n_bytes > INLINE_BYTES:
            fits = out is not None and out.device.type == "cpu" and described.matches(out)
            self._host = (
                out.detach() if fits else torch.empty(described.shape, dtype=described.dtype)
            )
            data = as_bytes(self._host)
            self._payload = gloo.recv(data, self._queue.src, 2 * self._queue.tag + 1)

    def finish(self, device: torch.device | None = None) -> Tensor:
        """Wait for the message, and return its tensor.

        device  where a new tensor is to lie; None: where the port says

        Raises InputError if the message does not fit into out.
        """
        port, out = self._queue.port, self._out
        while self._described is None:
            self._queue.wait_for_first()
        if self._payload is None:
            self._host = payload_in(self._first, self._described, None)
        else:
            port.gloo.wait(self._payload)
        check_fits(self._described, out, port.ranks[self._queue.src], self._queue.tag)
        if out is None:
            return self._host.to(device or port.device)
        if self._host.data_ptr() != out.data_ptr():
            out.detach().copy_(self._host)
        return out
