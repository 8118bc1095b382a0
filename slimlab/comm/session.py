"""How a rank that was started from outside ends: with the others, or saying what went wrong.

A part of slimlab.comm.connect. An exception that nobody catches ends a Python program, but not the
other ranks, which wait for it; so it is told to the keeper first, and all ranks end. A program that
ends as it should waits for the others, so that a call that one rank has skipped is found.

MPI's programs need MPI_Abort for the first, and know nothing of the second.
"""

import atexit
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress

from slimlab.comm.base import Communicator
from slimlab.comm.report import CommunicationError
from slimlab.comm.watch import Watch

LOCALHOST = "127.0.0.1"
LATER_S = 30.0
# What shells report of a program that Ctrl-C has ended.
INTERRUPTED = 130


def look_after(
    comm: Communicator,
    watch: Watch | None,
    end_runtime: Callable[[], None],
    end: Callable[[], None],
) -> None:
    """See to it that this rank ends with the others, whatever ends it.

    comm         of this rank
    watch        of this rank; None: there is none
    end_runtime  ends what connects the ranks, after the communicator is closed
    end          ends this process when something went wrong
    """
    pid, before = os.getpid(), sys.excepthook

    def fail(kind: type[BaseException], error: BaseException, its_traceback) -> None:
        if os.getpid() != pid:  # a process that the program has forked
            before(kind, error, its_traceback)
            return
        lost = isinstance(error, CommunicationError)  # perhaps since another rank has left
        if isinstance(error, KeyboardInterrupt) or (lost and _was_interrupted(watch)):
            _leave(watch)
        _flush()
        text = "".join(traceback.format_exception(error))
        if watch is not None:
            watch.raised(error, text)
            watch.wait_for_end(text)
        sys.stderr.write(text)
        sys.stderr.flush()
        end()

    def finish() -> None:
        if os.getpid() != pid:
            return
        if _was_interrupted(watch):
            _leave(watch)  # the others may never come to the end
        try:
            comm.close()
            end_runtime()
        except BaseException as error:
            fail(type(error), error, error.__traceback__)
        if watch is not None:
            watch.farewell()

    sys.excepthook = fail
    # Python shuts down executors of threads, which close() may need, before it calls what atexit
    # has registered; what is registered here is called before that.
    importlib.import_module("concurrent.futures.thread")
    getattr(threading, "_register_atexit", atexit.register)(finish)
    if watch is not None:
        watch.hear_interrupts()
        watch.begin(comm.progress)


def _was_interrupted(watch: Watch | None) -> bool:
    return watch is not None and watch.heard_interrupt()


def _leave(watch: Watch | None) -> None:
    _flush()
    if watch is not None:
        watch.farewell(interrupted=True)
    os._exit(INTERRUPTED)


def _flush() -> None:
    # A program may have closed it, or have put nothing into its place.
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
