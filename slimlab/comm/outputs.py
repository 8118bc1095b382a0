"""What ranks that are processes print: kept while they run, shown afterwards in rank order.

Chapter 07 shows it. Lines of several processes on one terminal come in any order and mix within a
line; production launchers leave it at that, or put the rank before each line, as is done here.
"""

import os
import sys
from typing import TextIO

HEAD_BYTES = TAIL_BYTES = 50_000
READ_BYTES = 2**16


class Output:
    """What one rank writes to one stream: the first and the last 50 KB of it.

    number  of the open file to read from; this object closes it
    """

    def __init__(self, number: int):
        os.set_blocking(number, False)
        self._number, self.open = number, True
        self._head, self._tail, self._left_out = bytearray(), bytearray(), 0

    def fileno(self) -> int:
        """Return the number of the open file, for select."""
        return self._number

    def read(self, limit: int = 16) -> None:
        """Take what is there, without waiting.

        limit  how many pieces at most, so that a rank that never stops writing holds up nobody
        """
        for _ in range(limit):
            try:
                data = os.read(self._number, READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                self.open = False
                return
            self._keep(data)

    def close(self) -> None:
        """Take what is still there, and close the file."""
        self.read(limit=1000)
        os.close(self._number)

    def show(self, prefix: str, stream: TextIO) -> None:
        """Write what was kept, line by line.

        prefix  before each line
        stream  where to
        """
        head, tail = (part.decode(errors="replace") for part in (self._head, self._tail))
        lines = _lines(head) if self._left_out else _lines(head + tail)
        if self._left_out:
            lines += [f"... {self._left_out:,} bytes left out ...", *_lines(tail)]
        if lines:
            stream.write("".join(f"{prefix}{line}\n" for line in lines))

    def _keep(self, data: bytes) -> None:
        room = HEAD_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room > 0 else data
        surplus = len(self._tail) - TAIL_BYTES
        if surplus > 0:
            del self._tail[:surplus]
            self._left_out += surplus


def _lines(text: str) -> list[str]:
    # A progress bar writes over its own line again and again: the last state is what remains.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines]


def show_outputs(outputs: list[tuple[Output, Output]]) -> None:
    """Show what all ranks have written, each line with its rank before it.

    outputs  in rank order: what went to stdout and to stderr
    """
    for stream, kind in ((sys.stdout, 0), (sys.stderr, 1)):
        for rank, pair in enumerate(outputs):
            pair[kind].show(f"[{rank}] ", stream)
        stream.flush()
