"""A line between a rank that is a process and whoever watches it: frames on a socket.

A frame is a few words in JSON and, where a rank sends back what its program returned, bytes behind
them. Nothing that comes from a network is unpickled: bytes are only read on a line that was made
before the rank was started, by the process that started it.

Production launchers do the same (PMI, PMIx); like them, a line that closes without a word of
farewell tells that the process at its other end has died.
"""

import json
import select
import socket
import struct
import threading
import time

SIZES = struct.Struct("!IQ")
READ_BYTES = 2**20


class Channel:
    """One end of a line.

    sock       a connected stream socket, which this object closes
    max_bytes  of a frame that is taken; None: any size
    """

    def __init__(self, sock: socket.socket, max_bytes: int | None = None):
        self._sock, self._max_bytes = sock, max_bytes
        self._sending, self._buffer = threading.Lock(), bytearray()
        self.open = True

    def fileno(self) -> int:
        """Return the number of the socket, for select."""
        return self._sock.fileno()

    def send(self, kind: str, blob: bytes = b"", **content: object) -> bool:
        """Send a frame; threads may send at the same time.

        kind     what it is about
        blob     bytes that go behind it
        content  further words, as JSON can hold them
        returns  whether the other end was still there
        """
        words = json.dumps({"kind": kind, **content}).encode()
        try:
            with self._sending:
                self._sock.sendall(SIZES.pack(len(words), len(blob)) + words)
                if blob:
                    self._sock.sendall(blob)
        except OSError:
            return False
        return True

    def read(self) -> list[tuple[dict, bytes]]:
        """Take what has arrived, without waiting; `open` is False once the other end is closed.

        returns  the frames that are whole: words and bytes
        """
        try:
            arrived = self._sock.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            arrived = b""
        self.open = bool(arrived)
        self._buffer += arrived
        frames = []
        while (frame := self._frame()) is not None:
            frames.append(frame)
        return frames

    def wait(self, timeout_s: float) -> list[tuple[dict, bytes]]:
        """Wait until something has arrived, and take it.

        timeout_s  how long at most
        returns    as read does; nothing if nothing came
        """
        poll = select.poll()  # select.select refuses the thousandth open file
        try:
            poll.register(self._sock, select.POLLIN)
        except ValueError:  # another thread has closed this end
            return []
        return self.read() if poll.poll(max(0.0, timeout_s) * 1000) else []

    def expect(self, kind: str, timeout_s: float) -> tuple[dict, bytes] | None:
        """Wait for a frame of one kind and drop all others.

        kind       of the frame
        timeout_s  how long at most
        returns    None if the other end closed, or nothing came
        """
        deadline_s = time.monotonic() + timeout_s
        while self.open and time.monotonic() < deadline_s:
            for words, blob in self.wait(deadline_s - time.monotonic()):
                if words["kind"] == kind:
                    return words, blob
        return None

    def close(self) -> None:
        """Close this end."""
        self.open = False
        self._sock.close()

    def _frame(self) -> tuple[dict, bytes] | None:
        if len(self._buffer) < SIZES.size:
            return None
        n_words, n_blob = SIZES.unpack_from(self._buffer)
        end = SIZES.size + n_words + n_blob
        if self._max_bytes is not None and end > self._max_bytes:
            self.open = False
            self._buffer.clear()
            return None
        if len(self._buffer) < end:
            return None
        try:
            words = json.loads(self._buffer[SIZES.size : SIZES.size + n_words])
            words["kind"]
        except (ValueError, LookupError, TypeError):  # whoever this is, it is no rank of ours
            self.open = False
            self._buffer.clear()
            return None
        blob = bytes(self._buffer[SIZES.size + n_words : end])
        del self._buffer[:end]
        return words, blob
