"""Where the keeper of a program that mpirun has started prints, so that it is heard.

What a rank prints goes to its launcher, which passes it on. MPICH's launcher passes on nothing any
more once a rank was killed, and that is when there is something to say. So the message goes where
the launcher itself prints, if it runs on this machine and the system allows it.
"""

import ctypes
import os
import stat
from contextlib import suppress
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun")
# Of all processors on Linux; Python's os module has no name for it.
PIDFD_GETFD = 438
STDERR = 2


def find_voice() -> int:
    """Return the number of an open file to which messages of this process should go."""
    launcher = _launcher()
    if launcher is None:
        return STDERR
    copy = _copy(launcher)
    return STDERR if copy is None else copy


def _launcher() -> int | None:
    """Find the outermost launcher that this process descends from."""
    found, pid = None, os.getppid()
    with suppress(OSError, ValueError, LookupError):
        while pid > 1:
            if Path(f"/proc/{pid}/comm").read_text().strip() in LAUNCHERS:
                found = pid
            # The name in brackets may hold anything; behind it come the state and the parent.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _copy(pid: int) -> int | None:
    """Return this process's own number for what another one prints its errors to."""
    with suppress(OSError, AttributeError):
        process = os.pidfd_open(pid)
        number = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, STDERR, 0)
        os.close(process)
        if number >= 0:
            return number
    path = f"/proc/{pid}/fd/{STDERR}"
    with suppress(OSError):
        mode = os.stat(path).st_mode
        # Opened a second time, a file would be written over from its beginning.
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open(path, os.O_WRONLY | os.O_NOCTTY)
    return None
