"""Messages over MPI: a header, with the payload behind it if that is small, else in a second one.

Chapter 07 uses it through slimlab.comm.mpi; slimlab.comm.wire says what stands in a header. A large
payload goes straight from and to its tensor. Headers and payloads travel on different communicators
of MPI: if several receives have been started, headers arrive in the order of sending, and payloads
are asked for in the order of their headers. Importing this module starts MPI.

Production programs know their shapes, receive into buffers that they keep, and leave headers out.
"""

from collections import deque

import torch
from mpi4py import MPI
from torch import Tensor

from slimlab.comm.calls import Handle
from slimlab.comm.mpi_buffers import Staging, memory
from slimlab.comm.mpi_transport import Transport
from slimlab.comm.wire import HEADER_BYTES, Described, check_fits, header_of, read_header

INLINE_BYTES = 4096


class Port:
    """Where the messages of one communicator leave and arrive.

    transport  of this rank
    headers    communicator of MPI for first messages
    payloads   communicator of MPI for payloads too large to go with their header; tag 0 stays free
    staging    finds memory that MPI can reach
    ranks      of the world, in the order of their rank here
    group      the same, or None for all
    device     where new tensors are to lie
    """

    def __init__(
        self,
        transport: Transport,
        headers: MPI.Comm,
        payloads: MPI.Comm,
        staging: Staging,
        ranks: tuple[int, ...],
        group: tuple[int, ...] | None,
        device: torch.device,
    ):
        self.transport, self.headers, self.payloads = transport, headers, payloads
        self.staging, self.ranks, self.group, self.device = staging, ranks, group, device
        self._me = ranks[headers.rank]
        self._first = bytearray(HEADER_BYTES + INLINE_BYTES)

    def send(self, tensor: Tensor, dst: int, tag: int) -> None:
        """Send, and wait until the tensor may be changed.

        tensor  this rank's
        dst     the rank that receives
        tag     of the message
        """
        first, payload = self._pack(tensor, dst, tag)
        self.transport.run(self.headers, "Send", first, dst, tag)
        if payload is not None:
            self.transport.run(self.payloads, "Send", memory(payload), dst, tag + 1)

    def isend(self, tensor: Tensor, dst: int, tag: int) -> Handle:
        """Start to send.

        tensor   this rank's
        dst      the rank that receives
        tag      of the message
        returns  a handle, which keeps what MPI reads
        """
        first, payload = self._pack(tensor, dst, tag)
        requests, kept = [self.transport.start(self.headers, "Send", first, dst, tag)], [payload]
        if payload is not None:
            args = memory(payload), dst, tag + 1
            requests.append(self.transport.start(self.payloads, "Send", *args))

        def finish() -> None:
            for request in requests:
                self.transport.wait(request)
            kept.clear()

        return Handle(finish)

    def irecv(self, src: int, tag: int, out: Tensor | None) -> "Incoming":
        """Start to receive.

        src      the rank that sends
        tag      of the message
        out      where to put it; None: a new tensor
        returns  what has been started
        """
        incoming = Incoming(self, src, tag, out)
        self.transport.queues.setdefault((self, src, tag), deque()).append(incoming)
        return incoming

    def recv(self, src: int, tag: int, out: Tensor | None) -> Tensor:
        """Wait for a message.

        src  the rank that sends
        tag  of the message
        out  where to put it; None: a new tensor
        """
        if (self, src, tag) in self.transport.queues:
            return self.irecv(src, tag, out).finish()
        self.transport.run(self.headers, "Recv", self._first, src, tag)
        return self._rest(src, tag, out)

    def sendrecv(self, tensor: Tensor, dst: int, src: int, tag: int, out: Tensor | None) -> Tensor:
        """Send and receive at the same time.

        tensor  what goes to dst
        dst     the rank that receives
        src     the rank that sends
        tag     of both messages
        out     where to put what arrives; None: a new tensor
        """
        transport = self.transport
        if transport.sleeps or transport.queues or tensor.nbytes > INLINE_BYTES:
            sent = self.isend(tensor, dst, tag)
            received = self.recv(src, tag, out)
            sent.wait()
            return received
        first, _ = self._pack(tensor, dst, tag)
        transport.block(self.headers, "Sendrecv", first, dst, tag, self._first, src, tag)
        return self._rest(src, tag, out)

    def opened(self, first: bytearray, src: int, tag: int, out: Tensor | None):
        """Read a header that has come.

        first    the first message
        src      the rank that sent
        tag      of the message
        out      where the caller wants the payload
        returns  what the header says, and memory for the payload: not in an out that does not fit
        """
        described = read_header(first)
        self.transport.balance[self.group, self.ranks[src], self._me, tag] -= 1
        out = out if out is not None and described.matches(out) else None
        device = self.device if out is None else out.device
        inline = described.n_bytes <= INLINE_BYTES
        work = self.staging.empty(described.shape, described.dtype, device, out, inline=inline)
        return described, work

    def closed(
        self,
        first: bytearray,
        described: Described,
        work: Tensor,
        src: int,
        tag: int,
        out: Tensor | None,
    ) -> Tensor:
        """Return the tensor of a message that has come whole.

        first      the first message
        described  what its header says
        work       memory for the payload
        src        the rank that sent
        tag        of the message
        out        where the caller wants the payload

        Raises InputError if the message does not fit into out.
        """
        if 0 < described.n_bytes <= INLINE_BYTES:
            memory(work)[:] = memoryview(first)[HEADER_BYTES : HEADER_BYTES + described.n_bytes]
        check_fits(described, out, src, tag)
        device = self.device if out is None else out.device
        return self.staging.deliver(work, described.dtype, device, out)

    def _rest(self, src: int, tag: int, out: Tensor | None) -> Tensor:
        described, work = self.opened(self._first, src, tag, out)
        if described.n_bytes > INLINE_BYTES:
            self.transport.run(self.payloads, "Recv", memory(work), src, tag + 1)
        return self.closed(self._first, described, work, src, tag, out)

    def _pack(self, tensor: Tensor, dst: int, tag: int) -> tuple[bytes, Tensor | None]:
        inline = tensor.nbytes <= INLINE_BYTES
        payload = self.staging.outgoing(tensor, inline=inline)
        header = header_of(payload)
        self.transport.balance[self.group, self._me, self.ranks[dst], tag] += 1
        return (b"".join((header, memory(payload))), None) if inline else (header, payload)


class Incoming:
    """A receive that has been started.

    port  of the communicator
    src   the rank that sends
    tag   of the message
    out   where the caller wants the tensor; None: a new one
    """

    def __init__(self, port: Port, src: int, tag: int, out: Tensor | None):
        self.port, self.src, self.tag, self.out = port, src, tag, out
        self.first = bytearray(HEADER_BYTES + INLINE_BYTES)
        self.header = port.transport.start(port.headers, "Recv", self.first, src, tag)
        self.described = self.work = self.payload = None

    def open(self) -> None:
        """Read the header, which has come, and begin to receive a payload of its own."""
        port = self.port
        self.described, self.work = port.opened(self.first, self.src, self.tag, self.out)
        if self.described.n_bytes > INLINE_BYTES:
            args = memory(self.work), self.src, self.tag + 1
            self.payload = port.transport.start(port.payloads, "Recv", *args)

    def finish(self) -> Tensor:
        """Wait for the message, and return its tensor."""
        port, transport = self.port, self.port.transport
        key = port, self.src, self.tag
        if len(transport.queues) == 1 and len(transport.queues.get(key, ())) == 1:
            del transport.queues[key]  # nothing else to look after: wait inside of MPI
            transport.wait(self.header)
            self.open()
        while self.described is None:
            transport.wait(transport.queues[key][0].header)
            transport.look_after_receives()
        if self.payload is not None:
            transport.wait(self.payload)
        return port.closed(self.first, self.described, self.work, self.src, self.tag, self.out)
