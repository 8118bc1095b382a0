"""What a process does that run_ranks has started as a rank: connect, run the program, send back.

slimlab.comm.process_ranks is the other side. The process may be a fork of the caller, which is
quick, or a fresh Python. Either way it owns its output and its session, hears no Ctrl-C (whoever
called run_ranks decides what an interrupt means), and dies with whoever started it.

A process that torchrun starts does all this in its own main program.
"""

import ctypes
import io
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from slimlab.comm.base import Communicator
from slimlab.comm.cells import leave_kernel
from slimlab.comm.channel import Channel
from slimlab.comm.shipping import Surroundings, pack, unpack
from slimlab.comm.watch import Watch

PR_SET_PDEATHSIG = 1
LOCALHOST = "127.0.0.1"
LATER_S = 30.0


@dataclass
class Task:
    """What the ranks of one run are to do.

    program, world_size, backend, timeout_s, args, check  as in slimlab.comm.launch.run_ranks
    port          of the store where ranks of gloo and NCCL meet; None: they need none
    surroundings  what ranks need that are not forked
    """

    program: Callable
    world_size: int
    backend: str
    timeout_s: float
    args: tuple
    check: bool
    port: int | None = None
    surroundings: Surroundings | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Lines:
    """The rank's ends of the lines to whoever started it, as numbers of open files.

    channel  a socket for slimlab.comm.channel
    out, err  where its output goes
    """

    channel: int
    out: int
    err: int

    def all(self) -> tuple[int, int, int]:
        """Return the three numbers."""
        return self.channel, self.out, self.err


def run_forked(
    task: Task, rank: int, lines: Lines, env: dict[str, str | None], parent: int
) -> None:
    """Become a rank, in a process that has just been forked; never returns.

    task    what to do
    rank    which rank to be
    lines   to whoever started it
    env     environment variables to set; None: to remove
    parent  the process that forked this one
    """
    try:
        os.setsid()
        _become_rank(lines, parent)
        # A process that has used OpenMP makes its forks hang in libgomp, if they use more threads.
        torch.set_num_threads = _keep_one_thread
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _run(task, rank, lines)
    finally:
        os._exit(1)


def run_spawned() -> None:
    """Become a rank, in a fresh Python whose command line says where the lines are; never returns.

    The arguments are the rank, the three numbers of the lines, that of a file with the packed task,
    and the process that started this one, or 0.
    """
    rank, *numbers, payload, parent = map(int, sys.argv[1:])
    lines = Lines(*numbers)
    try:
        _become_rank(lines, parent)
        task = unpack(os.pread(payload, os.fstat(payload).st_size, 0))
        os.close(payload)
        task.surroundings.enter()
        _run(task, rank, lines)
    finally:
        os._exit(1)


def _become_rank(lines: Lines, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with(parent)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((nothing, 0), (lines.out, 1), (lines.err, 2)):
        os.dup2(number, target)
        os.close(number)
    before = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    # Not what they were in the caller: those of a notebook would write into its cells.
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), errors=errors, line_buffering=True)
        for number, mode, errors in ((0, "r", None), (1, "w", "replace"), (2, "w", "replace"))
    )
    leave_kernel(before)


def _keep_one_thread(number: int) -> None:
    if number != 1:
        warnings.warn(
            f"a rank that run_ranks has forked has one thread for torch's work, not {number}",
            stacklevel=2,
        )


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent not in (0, os.getppid()):  # it was gone before it could be heard of
        os._exit(1)


def _run(task: Task, rank: int, lines: Lines) -> None:
    watch = Watch(Channel(socket.socket(fileno=lines.channel)), rank, must_last=True)
    line, pid = None, os.getpid()
    try:
        comm = _connect(task, rank, watch)
        result = task.program(comm, *task.args)
        _end_if_forked(pid)
        line = "the end of its program"
        comm.close()
        blob = _packed((result, comm.ledger), rank)
    except BaseException as error:  # sys.exit() too: nobody else would say a word of it
        _end_if_forked(pid, error)
        _flush()
        text = traceback.format_exc()
        watch.raised(error, text, _packed_error(error), line)
        watch.wait_for_end(text)
    _flush()
    watch.finished(blob)
    if task.backend == "mpi":
        from slimlab.comm.mpi_start import end_mpi

        end_mpi()
    watch.farewell()
    os._exit(0)


def _end_if_forked(pid: int, error: BaseException | None = None) -> None:
    """End a process that the program has forked and that came out of it, as Python ends others."""
    if os.getpid() == pid:
        return
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    _flush()
    os._exit((code or 0) & 0xFF)


def _connect(task: Task, rank: int, watch: Watch) -> Communicator:
    if task.backend == "mpi":
        from slimlab.comm.mpi_start import connect_mpi

        comm = connect_mpi(task.world_size, check=task.check)
    else:
        from slimlab.comm.distributed import init_torch

        store = torch.distributed.TCPStore(LOCALHOST, task.port, is_master=False)
        # Later than the watch, which knows of all ranks and says more.
        late_s = 2 * task.timeout_s + LATER_S
        comm = init_torch(task.backend, rank, task.world_size, store, late_s, task.check)
    watch.begin(comm.progress)
    return comm


def _packed(result: object, rank: int) -> bytes:
    try:
        return pack(result)
    except Exception as error:
        raise TypeError(
            f"what the program returned on rank {rank} cannot travel to the caller: {error}\n"
            "change: return tensors, numbers, texts, and lists or dictionaries of them"
        ) from error


def _packed_error(error: BaseException) -> bytes:
    try:
        blob = pack(error)
        unpack(blob)  # an exception that pickles may still refuse to be made again
        return blob
    except Exception:
        return b""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A program may have closed it, or have put nothing into its place.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
