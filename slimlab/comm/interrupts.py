"""Interrupts from the keyboard, while something must not be left half done.

Whoever runs a cell that hangs presses the button again and again. The first interrupt ends the
ranks; the next ones must not keep it from ending them all. Chapter 07 relies on it.

Production launchers count: the first Ctrl-C asks all ranks to end, the second kills them.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Let interrupts wait for the end of a with block; only the main thread gets any."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])
