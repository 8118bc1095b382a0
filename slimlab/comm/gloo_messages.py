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

import ctypes
from collections import deque

import torch
from torch import Tensor
from torch.distributed import Work

from slimlab.comm.calls import Handle
from slimlab.comm.torch_carriers import Carriers
from slimlab.comm.torch_memory import plain
from slimlab.comm.wire import (
    HEADER_BYTES,
    Described,
    as_bytes,
    check_fits,
    header_of,
    read_header,
)

# Up to here, and beyond, copying twice took less time than a second message: 0.22 ms there and back
# instead of 0.37.
INLINE_BYTES = 65536
# Programs have tags up to 2^20; of each, headers take the even number and payloads the odd one.
GATHER_TAG, SCATTER_TAG, TEXT_TAG = range(2**20 + 1, 2**20 + 4)
COMPARE_TAG = 2**22  # of messages without a header
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
        self._first = First(INLINE_BYTES)

    def send(self, tensor: Tensor, dst: int, tag: int) -> None:
        """Send, and wait until the message is received.

        tensor  this rank's
        dst     the rank that receives
        tag     of the message
        """
        for _, work in self._start(tensor, dst, tag):
            self.gloo.wait(work)

    def isend(self, tensor: Tensor, dst: int, tag: int) -> Handle:
        """Start to send.

        tensor   this rank's
        dst      the rank that receives
        tag      of the message
        returns  a handle, which keeps what gloo reads
        """
        started = self._start(tensor, dst, tag)

        def finish() -> None:
            for _, work in started:
                self.gloo.wait(work)
            started.clear()

        return Handle(finish)

    def recv(
        self, src: int, tag: int, out: Tensor | None, device: torch.device | None = None
    ) -> Tensor:
        """Wait for a message, and return its tensor.

        src     the rank that sends
        tag     of the message
        out     where to put it; None: a new tensor
        device  where a new tensor is to lie; None: where the port says

        Raises InputError if the message does not fit into out.
        """
        if (self, src, tag) in self.gloo.lookout.queues:
            return self.irecv(src, tag, out).finish()
        self.gloo.wait(self.gloo.recv(self._first.data, src, 2 * tag))
        described, host, payload = self.opened(self._first, src, tag, out)
        if payload is not None:
            self.gloo.wait(payload)
        return self.delivered(described, host, src, tag, out, device)

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

    def opened(
        self, first: "First", src: int, tag: int, out: Tensor | None
    ) -> tuple[Described, Tensor, Work | None]:
        """Read a header that has come, and begin to receive a payload of its own.

        first    the message
        src      the rank that sent
        tag      of the message
        out      where the caller wants the payload
        returns  what the header says, where the payload is or will be, and what to wait for
        """
        described = read_header(first.buffer)
        host = out.detach() if out is not None else None
        if host is None or host.device.type != "cpu" or not described.matches(host):
            host = torch.empty(described.shape, dtype=described.dtype, device=HOST)
        if described.n_bytes > INLINE_BYTES:
            return described, host, self.gloo.recv(as_bytes(host), src, 2 * tag + 1)
        ctypes.memmove(host.data_ptr(), first.data.data_ptr() + HEADER_BYTES, described.n_bytes)
        return described, host, None

    def delivered(
        self,
        described: Described,
        host: Tensor,
        src: int,
        tag: int,
        out: Tensor | None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return the tensor of a message that has come whole.

        described  what its header says
        host       where the payload is
        src        the rank that sent
        tag        of the message
        out        where the caller wants it
        device     where a new tensor is to lie; None: where the port says

        Raises InputError if the message does not fit into out.
        """
        check_fits(described, out, self.ranks[src], tag)
        if out is None:
            return host.to(device or self.device)
        if host.data_ptr() != out.data_ptr():
            out.detach().copy_(host)
        return out

    def texts(self, text: str) -> list[str]:
        """Give every rank the text of each.

        text     this rank's, not empty
        returns  in rank order

        Communicates: one message from each rank to each.
        """
        others = [rank for rank in range(len(self.ranks)) if rank != self.rank]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sent = [self.isend(data, rank, TEXT_TAG) for rank in others]
        texts = {rank: self.recv(rank, TEXT_TAG, None, HOST).tolist() for rank in others}
        for handle in sent:
            handle.wait()
        texts[self.rank] = data.tolist()
        return [bytes(texts[rank]).decode() for rank in sorted(texts)]

    def _start(self, tensor: Tensor, dst: int, tag: int) -> list[tuple[Tensor, Work]]:
        payload = plain(tensor.cpu())
        if payload.nbytes <= INLINE_BYTES:
            first = First(payload.nbytes, header_of(payload)).data
            ctypes.memmove(first.data_ptr() + HEADER_BYTES, payload.data_ptr(), payload.nbytes)
            return [(first, self.gloo.send(first, dst, 2 * tag))]
        first, data = First(0, header_of(payload)).data, as_bytes(payload)
        return [
            (first, self.gloo.send(first, dst, 2 * tag)),
            (data, self.gloo.send(data, dst, 2 * tag + 1)),
        ]


class First:
    """The memory of a first message.

    n_bytes  room for a payload behind the header
    header   None: of a message to come

    buffer   all of it
    data     the same memory as uint8
    """

    def __init__(self, n_bytes: int, header: bytes | None = None):
        self.buffer = bytearray(HEADER_BYTES + n_bytes)
        if header is not None:
            self.buffer[:HEADER_BYTES] = header
        self.data = torch.frombuffer(self.buffer, dtype=torch.uint8)

    @property
    def has_come(self) -> bool:
        """Whether the message has come, or begins to: gloo only tells those who wait for it."""
        return self.buffer[0] != 0


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
        while self._incoming and self._incoming[0].first.has_come:
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
        self.first = First(INLINE_BYTES)
        self.header = queue.port.gloo.recv(self.first.data, queue.src, 2 * queue.tag)
        self._opened: tuple[Described, Tensor, Work | None] | None = None

    def open(self) -> None:
        """Read the header, which has come, and begin to receive a payload of its own."""
        queue = self._queue
        self._opened = queue.port.opened(self.first, queue.src, queue.tag, self._out)

    def finish(self) -> Tensor:
        """Wait for the message, and return its tensor.

        Raises InputError if the message does not fit into out.
        """
        queue = self._queue
        while self._opened is None:
            queue.wait_for_first()
        described, host, payload = self._opened
        if payload is not None:
            queue.port.gloo.wait(payload)
        return queue.port.delivered(described, host, queue.src, queue.tag, self._out)
