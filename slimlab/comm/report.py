"""Errors of communication, and the tables that say which rank stood where.

Chapter 00 shows the first of them, chapter 07 provokes them all. A line is named by its number,
its function and its text, so that it can be found in a notebook cell, which has no file.

MPI names neither call nor line: a program that waits for itself just hangs. PyTorch names them
after a time limit, with its debug level set to DETAIL.
"""

import linecache
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FrameType, TracebackType

LIBRARIES = sys.stdlib_module_names | {"slimlab", "torch", "numpy"}


class CommunicationError(RuntimeError):
    """A parallel program did not end as it should, or a communicator is used after its run."""


class DeadlockError(CommunicationError):
    """Every rank that has not finished waits for something that can no longer come."""


class MismatchError(CommunicationError):
    """All ranks met in a collective, but not in the same one or not with fitting arguments."""


class UnreceivedError(CommunicationError):
    """All ranks finished, and a message is left that nobody received."""


class UnwaitedError(CommunicationError):
    """All ranks finished, and a call that was started was never waited for."""


class RanksTimeoutError(CommunicationError, TimeoutError):
    """The ranks had not finished after the time allowed."""


class RankError(CommunicationError):
    """One rank's program raised; the original exception is the __cause__.

    rank     the rank that raised
    message  what it raised and where
    """

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


def text_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows under headers in aligned columns.

    headers  one word or two per column
    rows     one value per column
    """
    cells = [list(headers), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def short_group(ranks: Sequence[int]) -> str:
    """Write the ranks of a group as tables show them.

    ranks  of the world
    """
    if len(ranks) <= 8:
        return f"({', '.join(map(str, ranks))})"
    return f"({', '.join(map(str, ranks[:4]))}, ..., {ranks[-1]})"


def frames_of(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """Walk a running thread's frames with their line numbers, the innermost first.

    frame  the innermost frame
    """
    while frame is not None:
        yield frame, _line_of(frame, frame.f_lineno)
        frame = frame.f_back


def frames_of_traceback(traceback: TracebackType | None) -> list[tuple[FrameType, int]]:
    """List a traceback's frames with their line numbers, the innermost first.

    traceback  as an exception carries it
    """
    steps = []
    while traceback is not None:
        steps.append((traceback.tb_frame, _line_of(traceback.tb_frame, traceback.tb_lineno)))
        traceback = traceback.tb_next
    return steps[::-1]


def _line_of(frame: FrameType, line: int | None) -> int:
    # Between two lines of a program Python may be at none.
    return frame.f_code.co_firstlineno if line is None else line


def described(shapes: Sequence[tuple[int, ...]]) -> str:
    """Describe the messages that have these `shapes`, without listing thousands."""
    if len(shapes) == 1:
        return f"one of shape {shapes[0]}"
    return f"{len(shapes):,} messages, the first of shape {shapes[0]},"


def leavings(sent: Sequence[str], unwaited: Sequence[Sequence[str]]) -> CommunicationError | None:
    """Say what is left after all ranks have finished.

    sent      messages that were never received, one line each
    unwaited  of every rank, calls that were started and never waited for
    returns   None if nothing is left
    """
    begun = [f"rank {rank}: {what}" for rank, whats in enumerate(unwaited) for what in whats]
    lines = []
    if sent:
        lines += ["all ranks have finished, and messages were never received:", *sent]
    if begun:
        lines += ["all ranks have finished, and calls that were started never waited for:", *begun]
    if not lines:
        return None
    if begun:
        lines.append(
            "change: call wait() of every handle; before, what it gives is not there, and on other "
            "runtimes what it sends may never leave"
        )
    else:
        lines.append(
            "change: add the missing recv, or drop the send; other runtimes may wait for ever"
        )
    return (UnreceivedError if sent else UnwaitedError)("\n".join(lines))


def message_of(error: BaseException) -> str:
    """Return kind and message of any `error`, also of one whose own message fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:
        return f"{type(error).__name__}, whose message fails with {type(another).__name__}"


def user_line(steps: Iterable[tuple[FrameType, int]]) -> str:
    """Describe the line of the reader's program that led here.

    steps    frames with line numbers, the innermost first
    returns  "line 3 of ring: value = comm.recv(1)": the innermost line outside of the libraries;
             of slimlab outside of slimlab.comm where the program itself is slimlab's
    """
    return line_at(position_of(steps))


# A code object, a line number and the module's globals: unlike a frame, it keeps no local variable.
Position = tuple[CodeType, int, dict]


def position_of(steps: Iterable[tuple[FrameType, int]]) -> Position | None:
    """Find the line that user_line describes; cheap enough for every call.

    steps    frames with line numbers, the innermost first
    returns  where it is; None: there is none
    """
    demo = installed = None
    for frame, line in steps:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in LIBRARIES:
            if "site-packages" not in frame.f_code.co_filename:
                return frame.f_code, line, frame.f_globals
            installed = installed or (frame.f_code, line, frame.f_globals)
        elif demo is None and module[:8] == "slimlab." and module[:13] != "slimlab.comm.":
            demo = frame.f_code, line, frame.f_globals
    return demo or installed


def line_at(position: Position | None) -> str:
    """Describe a line as user_line does.

    position  what position_of returned
    """
    if position is None:
        return "before its first line"
    code, line, its_globals = position
    text = linecache.getline(code.co_filename, line, its_globals).strip()
    return f"line {line} of {code.co_name}" + (f": {text}" if text else "")
