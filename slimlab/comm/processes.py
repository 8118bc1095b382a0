"""The processes of one run, as seen by the process that has started them.

slimlab.comm.supervise looks after them, slimlab.comm.process_ranks and slimlab.comm.mpirun start
them. Each leads a session of its own, so that all that it starts can be ended with it; each is kept
as a zombie until then, so that its number can belong to no other process.

Production launchers do the same on every host (hydra's proxies, torchrun's agents).
"""

import gc
import os
import random
import signal
import socket
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from slimlab.comm.channel import Channel
from slimlab.comm.outputs import Output, show_outputs
from slimlab.comm.rank_process import Lines, Task, run_forked

# How long ranks that have sent their results may take to end, and those that were killed to go.
GRACE_S = 2.0
REAP_S = 0.005


@dataclass
class RankProcess:
    """The caller's view of one rank.

    channel   to it
    outputs   what it writes to stdout and stderr
    pid       of its process; None: it is a child of mpirun, not of this process
    ended     how its process has ended, once it has
    """

    channel: Channel
    outputs: tuple[Output, Output]
    pid: int | None = None
    ended: str | None = None

    def look(self) -> None:
        """Find out whether the process has ended; it stays a zombie, so that its number is ours."""
        if self.pid is None and not self.channel.open:
            self.ended = self.ended or "ended without a word"
        if self.pid is None or self.ended is not None:
            return
        try:
            self.ended = _end_of(self.pid)
        except ChildProcessError:  # somebody else has waited for it
            self.ended = "ended without a word"

    def kill(self) -> None:
        """End the process and all that it has started, and take the zombie away."""
        if self.pid is None:
            return
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s:
            try:
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                break
            time.sleep(REAP_S)
        self.pid = None


@dataclass
class Run:
    """All processes of one run.

    ranks  the caller's view of them, by rank
    after  what is left to do once they have ended
    """

    ranks: dict[int, RankProcess] = field(default_factory=dict)
    after: ExitStack = field(default_factory=ExitStack)

    def add(self, rank: int) -> tuple[RankProcess, Lines]:
        """Make the lines for one more rank.

        rank     its number
        returns  the caller's ends, and the numbers of the rank's ends
        """
        here, there = socket.socketpair()
        pipes = [os.pipe(), os.pipe()]
        outputs = tuple(Output(number) for number, _ in pipes)
        self.ranks[rank] = RankProcess(Channel(here), outputs)
        return self.ranks[rank], Lines(there.detach(), pipes[0][1], pipes[1][1])

    def fork(
        self, task: Task, rank: int, env: dict[str, str | None], others: Sequence[int] = ()
    ) -> None:
        """Fork this process for one more rank.

        task    what it is to do
        rank    its number
        env     environment variables for it; None: it is not to have that one
        others  open files that it must not keep
        """
        one, lines = self.add(rank)
        parent, python_state = os.getpid(), random.getstate()
        # What the caller has left to collect may wait, when it goes, for threads that a fork lacks:
        # torch's stores and process groups do.
        collects = gc.isenabled()
        gc.disable()
        # An interrupt in the fork would come out of run_ranks there too.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with warnings.catch_warnings():
                # A notebook's kernel has other threads. The fork uses none of what they may hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                one.pid = os.fork()
            if one.pid == 0:
                gc.freeze()
                if collects:
                    gc.enable()
                self._close_here(others)
                random.setstate(python_state)  # Python seeds anew after a fork
                run_forked(task, rank, lines, env, parent)
        finally:
            if one.pid == 0:
                os._exit(1)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if collects:
                gc.enable()
        close_all(lines.all())

    def _close_here(self, others: Sequence[int]) -> None:
        """Close, in a fork, what belongs to the caller and to other ranks."""
        for mine in self.ranks.values():
            mine.channel.close()
            for output in mine.outputs:
                os.close(output.fileno())
        close_all(others)

    def end(self, kindly: bool) -> None:
        """End all ranks, and what they have started.

        kindly  they have sent their results, so give them time to end by themselves
        """
        deadline_s = time.monotonic() + (GRACE_S if kindly else 0.0)
        for one in self.ranks.values():
            while one.channel.open and time.monotonic() < deadline_s:
                one.channel.wait(deadline_s - time.monotonic())
        for one in self.ranks.values():
            one.kill()
            one.channel.close()
            for output in one.outputs:
                output.close()
        self.after.close()

    def show(self) -> None:
        """Show what the ranks have written, in rank order."""
        show_outputs([self.ranks[rank].outputs for rank in sorted(self.ranks)])


def _end_of(pid: int) -> str | None:
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        found, status = os.waitpid(pid, os.WNOHANG)
        exited = os.WIFEXITED(status)
        how = how_it_ended(exited, os.WEXITSTATUS(status) if exited else os.WTERMSIG(status))
        return how if found else None
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if found is None else how_it_ended(found.si_code == os.CLD_EXITED, found.si_status)


def open_standard_files() -> None:
    """Open what a caller without a terminal has closed, so that no line gets such a number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(number)


def how_it_ended(exited: bool, status: int) -> str:
    """Say how a process has ended.

    exited  by itself, not by a signal
    status  what it exited with, or the number of the signal
    """
    if exited:
        return f"ended with exit status {status}"
    try:
        return f"was killed by signal {status} ({signal.Signals(status).name})"
    except ValueError:
        return f"was killed by signal {status}"


def close_all(numbers: Sequence[int]) -> None:
    """Close open files.

    numbers  of the files
    """
    for number in numbers:
        os.close(number)
