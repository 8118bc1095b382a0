"""The side of a rank that is a process: it tells where it stands, and ends when it is told to.

A thread looks every 0.2 s at what the rank does and sends it to the board (slimlab.comm.board). It
costs the program nothing that could be measured. If the board has said what went wrong, or the
process that started the rank is gone, the thread ends the process at once: a rank that waits in C
cannot be ended by an exception.

Production runtimes have such threads too (NCCL's watchdog), but each looks at its own rank only.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

from slimlab.comm.calls import Progress
from slimlab.comm.channel import Channel
from slimlab.comm.report import (
    CommunicationError,
    frames_of,
    frames_of_traceback,
    message_of,
    user_line,
)
from slimlab.comm.stacks import offer_stack
from slimlab.comm.standing import INTERRUPT_S, PERIOD_S

# Counts are sent once a rank has stood still for so long: most calls are over by then.
COUNTS_AFTER_S = 2 * PERIOD_S
# Many programs go wrong at once; reports come more often in the beginning.
FIRST_PERIOD_S = 0.01
FAREWELL_S = 5.0


class Watch:
    """Tells one rank's board where the rank stands, from now on; call it in the main thread.

    channel    to the board
    rank       of the world
    must_last  end the process when the board is gone too, not only when what started it is gone
    token      the secret by which a keeper knows its ranks
    end        ends the process
    """

    def __init__(
        self,
        channel: Channel,
        rank: int,
        *,
        must_last: bool,
        token: str = "",
        end: Callable[[], None] = lambda: os._exit(1),
    ):
        self._channel, self._must_last, self._end = channel, must_last, end
        self._main, self._pid = threading.get_ident(), os.getpid()
        self._parent, self._start_s = os.getppid(), time.monotonic()
        self._over = threading.Event()
        self._ear: socket.socket | None = None
        self._interrupt_s = -INTERRUPT_S
        self._progress: Progress | None = None
        host = socket.gethostname()
        channel.send(
            "hello", rank=rank, pid=self._pid, host=host, memory=offer_stack(), token=token
        )
        # A process that the program forks must not hold the line open when the rank has died.
        os.register_at_fork(after_in_child=channel.close)
        self._thread = threading.Thread(target=self._run, name="slimlab watch", daemon=True)
        self._thread.start()

    def begin(self, progress: Progress) -> None:
        """Tell that the rank has connected, and its program begins.

        progress  of its communicator
        """
        self._progress = progress
        self._channel.send("row", **self._row())

    def hear_interrupts(self) -> None:
        """Hear of interrupts from the keyboard also while the main thread waits in C.

        Python tells the main thread when it comes back, which may be never. Does nothing in
        another thread, or where the program has such an ear of its own.
        """
        ear, mouth = socket.socketpair()
        for one in (ear, mouth):
            one.setblocking(False)
        try:
            before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        except ValueError:
            before = None
        if before != -1:
            if before is not None:
                signal.set_wakeup_fd(before)
            ear.close()
            mouth.close()
            return
        self._ear, self._mouth = ear, mouth
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def heard_interrupt(self) -> bool:
        """Tell whether an interrupt from the keyboard has come of late, and tell the board too."""
        if self._ear is not None:
            with suppress(BlockingIOError):
                if signal.SIGINT in self._ear.recv(1024):
                    self._interrupt_s = time.monotonic()
                    self._channel.send("interrupted")
        return time.monotonic() - self._interrupt_s < INTERRUPT_S

    def raised(
        self, error: BaseException, traceback: str, blob: bytes = b"", line: str | None = None
    ) -> None:
        """Tell that the program has raised.

        error      what
        traceback  of it, as text
        blob       the exception as bytes for run_ranks
        line       where in the program; None: as the error says
        """
        if line is None:
            line = user_line(frames_of_traceback(error.__traceback__))
        self._channel.send(
            "raised",
            blob,
            error=message_of(error),
            type=type(error).__name__,
            line=line,
            traceback=traceback,
            # Messages of communicators name rank and line themselves.
            ours=isinstance(error, CommunicationError),
            # A communicator that has lost another rank says so with the plain class.
            starts=self._progress is None,
            consequence=type(error) is CommunicationError,
        )

    def finished(self, blob: bytes) -> None:
        """Tell that the program has returned, and what.

        blob  the result
        """
        self._channel.send("result", blob)

    def farewell(self, interrupted: bool = False) -> None:
        """Tell that this rank ends as it should; nobody looks after it any more.

        interrupted  by the keyboard, which all ranks of a launcher hear
        """
        self._over.set()
        self._channel.send("farewell", interrupted=interrupted)
        self._channel.close()

    def wait_for_end(self, text: str) -> None:
        """Wait until the board has said what went wrong and ends this process.

        text  what is to be said if nobody keeps the board any more
        """
        self._thread.join(FAREWELL_S)
        sys.stderr.write(text)
        sys.stderr.flush()
        self._end()

    def _run(self) -> None:
        period_s = FIRST_PERIOD_S
        while not self._over.is_set():
            self._channel.send("row", **self._row())
            frames = self._channel.wait(period_s)
            period_s = min(2 * period_s, PERIOD_S)
            gone = os.getppid() != self._parent or (self._must_last and not self._channel.open)
            if self._over.is_set():
                return
            self.heard_interrupt()
            if gone or any(words["kind"] == "end" for words, _ in frames):
                self._end()
            if not self._channel.open:
                return

    def _row(self) -> dict:
        progress, now_s = self._progress, time.monotonic()
        line = user_line(_frames_of_program(sys._current_frames().get(self._main)))
        row = dict.fromkeys(("name", "call"), "") | dict.fromkeys(
            ("source", "target", "group", "counts")
        )
        for_s = now_s - self._start_s
        row |= {"state": "starts", "line": line, "for_s": for_s, "num_calls": 0}
        if progress is None:
            return row
        call, since_s, num_calls = progress.call, progress.since_s, progress.num_calls
        row |= {"state": "computes", "for_s": now_s - since_s, "num_calls": num_calls}
        if call is None:
            return row
        row |= {"state": "waits", "name": call.name, "call": str(call)}
        row |= {"source": call.source, "target": call.target, "group": call.group}
        if call.name == "finish":
            row["state"] = "has finished"
        if now_s - since_s > COUNTS_AFTER_S:
            counts = progress.counts.as_lists()
            # Only if it stood still while the counts were taken do they belong to this call.
            row["counts"] = counts if progress.num_calls == num_calls else None
        return row


def _frames_of_program(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    # What lies further out is the program that has called run_ranks, if this process is its fork.
    for one, line in frames_of(frame):
        if one.f_globals.get("__name__") == "slimlab.comm.rank_process":
            return
        yield one, line
