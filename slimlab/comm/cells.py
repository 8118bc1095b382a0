"""What a fork of a notebook's kernel must leave behind to be a rank.

In a kernel, what is displayed, logged or asked goes through sockets to the browser. They are the
caller's; a fork that used them would be heard by nobody, or take away what is meant for the caller.
Chapter 07 runs its programs from cells.

Production launchers start fresh processes, which have none of this.
"""

import builtins
import logging
import sys


def leave_kernel(before: tuple[object, object]) -> None:
    """Let this process display as text, log to its own output, and be answered nothing.

    before  what sys.stdout and sys.stderr were in the caller
    """
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        for old, new in zip(before, (sys.stdout, sys.stderr)):
            if getattr(handler, "stream", None) is old and old is not None:
                handler.stream = new
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        # The plain one prints; a kernel's own sends to the browser.
        shell.display_pub = sys.modules["IPython.core.displaypub"].DisplayPublisher(shell=shell)
        builtins.input = _no_answer


def _no_answer(prompt: object = "") -> str:
    raise EOFError("a rank has no keyboard: ask in the caller, and pass the answer with args=(...)")
