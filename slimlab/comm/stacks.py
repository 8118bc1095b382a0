"""The line of a program that answers nobody: a loop in C that lets no other thread run.

Chapter 07 meets such a rank. Python's own means (sys._current_frames) need a thread that runs. The
faulthandler module needs none: on a signal it writes the stack from within the signal's handler.
The text goes to memory without a name, which others of the same user read through /proc; where
there is no /proc, the last line that the rank reported must do. Production tools (py-spy) read
the memory of the process.
"""

import faulthandler
import linecache
import os
import re
import signal
import sysconfig
import time
from pathlib import Path

# Far from the signals that programs and schedulers use.
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", 64) - 3
FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')
LIBRARIES = ("site-packages", "dist-packages", str(Path(__file__).resolve().parent))
WAIT_S = 1.0


def offer_stack() -> int | None:
    """Let others ask this process for its stack.

    returns  what they need to know besides the process's number; None: not here
    """
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
        return None
    memory = os.memfd_create("stack")
    faulthandler.register(DUMP_SIGNAL, file=memory, all_threads=False)
    return memory


def line_of(pid: int, memory: int | None) -> str | None:
    """Ask another process on this machine for the line of its program.

    pid      its number
    memory   what offer_stack returned there
    returns  as slimlab.comm.report.user_line; None: it cannot be found out
    """
    if memory is None:
        return None
    try:
        os.kill(pid, DUMP_SIGNAL)
        deadline_s = time.monotonic() + WAIT_S
        before, text = "", ""
        while (not text or text != before) and time.monotonic() < deadline_s:
            time.sleep(0.01)
            before, text = text, Path(f"/proc/{pid}/fd/{memory}").read_text(errors="replace")
    except OSError:
        return None
    return _line_in(text)


def _line_in(text: str) -> str | None:
    library = sysconfig.get_paths()["stdlib"]
    for path, line, name in FRAME.findall(text):
        if path.startswith(library) or any(part in path for part in LIBRARIES):
            continue
        source = linecache.getline(path, int(line)).strip()
        return f"line {line} of {name}" + (f": {source}" if source else "")
    return None
