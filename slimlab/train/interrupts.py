"""Ending a run in good order: Ctrl-C and SIGTERM wait for the end of the step and a checkpoint.

In the middle of a step weights and optimizer do not belong together, so a signal is only noted.
Chapter 05 shows it. Production schedulers send SIGTERM (or SIGUSR1) some time before they kill.
"""

import signal
import sys
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """Say that a run was stopped by a signal, after which step, and how to go on.

    message        for the person
    signal_number  signal.SIGINT or signal.SIGTERM
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """A context in which the first Ctrl-C or SIGTERM is noted in `received`; the second one acts.

    enabled  False: signals act at once, as ever; so they do outside Python's main thread
    """

    def __init__(self, enabled: bool = True):
        self.received: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        if self._enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the earlier handlers back, whatever happened.

        kind, error, trace  of an exception that passes
        """
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__(None, None, None)
        print("\nstopping after this step; again to stop at once", file=sys.stderr, flush=True)
