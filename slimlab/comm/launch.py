"""Start a parallel program: run_ranks calls program(comm, ...) on every rank and always returns.

Chapter 00 uses it first, with ranks that are threads of this process. Chapter 07 starts the same
programs as processes that MPI, gloo or NCCL connects. Production launchers (mpirun, torchrun) start
processes on many machines and know nothing of what they run; slimlab.comm.connect is for programs
that they start.
"""

import inspect
from collections.abc import Callable

from slimlab.comm.calls import check_timeout
from slimlab.comm.ledger import PayloadLedger
from slimlab.comm.thread_ranks import run_in_threads
from slimlab.config import InputError, check_choice, check_size, require

BACKENDS = ("threads", "mpi", "gloo", "nccl")
MAX_THREAD_RANKS, MAX_PROCESS_RANKS = 256, 64


class RankResults(list):
    """What the program returned on every rank, in rank order.

    results  one per rank
    ledgers  one slimlab.comm.base.PayloadLedger per rank, in rank order
    """

    def __init__(self, results: list, ledgers: list[PayloadLedger]):
        super().__init__(results)
        self.ledgers = ledgers


def run_ranks(
    program: Callable,
    world_size: int,
    *,
    backend: str = "threads",
    timeout_s: float = 60.0,
    args: tuple = (),
    check: bool = True,
    eager_bytes: int | None = None,
) -> RankResults:
    """Run program(comm, *args) on every rank and collect what it returns.

    Threads take turns, always in the same order. Each has a torch random state of its own that
    starts as a copy of the caller's. Global variables are shared: a program that is to run
    everywhere keeps its data in local ones. Two threads that call run_ranks at the same time
    disturb each other's random states.

    Processes run on this machine at the same time, each with one thread for torch's work and with
    the caller's variables and random states as they were at the call; what a rank changes, the
    caller does not see. What they print is shown at the end, rank after rank. All of them are gone
    when run_ranks returns.

    program      a function of a communicator and args
    world_size   number of ranks: at most 256 threads or 64 processes
    backend      "threads"; or processes connected by "mpi", "gloo" or, with a GPU each, "nccl"
    timeout_s    time allowed for all of it
    args         further arguments; the same objects for every rank that is a thread, else copies
    check        processes compare their calls before each collective; threads always do
    eager_bytes  of threads: a send of more than this waits until it is received; None: none waits
    returns      a list of one result per rank, with the ranks' ledgers as .ledgers

    Raises, all of them CommunicationError (slimlab.comm.report):
    RankError if the program raises on a rank, with the original as its __cause__, or if a rank's
    process ends before its program does;
    DeadlockError if no rank can go on, with what each waits for and at which line: of threads at
    once, of processes after a second or, where a send waits, a few;
    MismatchError if ranks meet in different collectives, or with other shapes or operations;
    UnreceivedError if a message was sent that nobody received;
    UnwaitedError if a call was started and never waited for;
    RanksTimeoutError after timeout_s. And InputError for arguments that do not fit, or a backend
    that this machine does not have.
    """
    _check_program(program, args)
    _check_numbers(world_size, backend, timeout_s, eager_bytes)
    if backend == "threads":
        run = run_in_threads(program, world_size, timeout_s, tuple(args), eager_bytes)
    else:
        run = _run_processes(program, world_size, backend, timeout_s, tuple(args), check)
    return RankResults(*run)


def why_not(backend: str, world_size: int = 1) -> str | None:
    """Tell why a backend cannot be used on this machine, or None if it can.

    backend     "threads", "mpi", "gloo" or "nccl"
    world_size  number of ranks that are wanted
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "mpi":
        from slimlab.comm.mpirun import why_no_mpi

        return why_no_mpi()
    if backend == "nccl":
        from slimlab.comm.process_ranks import why_no_nccl

        return why_no_nccl(world_size)
    return None


def backend_or_threads(backend: str, world_size: int = 1) -> str:
    """Return the backend, or "threads" where this machine does not have it, and say so.

    backend     "threads", "mpi", "gloo" or "nccl"
    world_size  number of ranks that are wanted
    """
    reason = why_not(backend, world_size)
    if reason is None:
        return backend
    print(f"{backend} cannot be used here ({reason}): the ranks are threads instead")
    return "threads"


def _run_processes(program, world_size, backend, timeout_s, args, check) -> tuple[list, list]:
    # What follows costs time to import, which chapters that need threads only are spared.
    from slimlab.comm import process_ranks
    from slimlab.comm.rank_process import Task
    from slimlab.comm.supervise import run_in_processes

    reason = why_not(backend, world_size)
    require(
        reason is None,
        f"backend: one that this machine has for {world_size} ranks",
        f"backend = {backend!r}: {reason}",
        'use backend="threads", or see what `slimlab doctor` says',
    )
    task = Task(program, world_size, backend, timeout_s, args, check)
    forks = process_ranks.why_no_fork(backend) is None
    if backend == "mpi":
        from slimlab.comm import mpirun

        start = mpirun.fork_ranks if forks else mpirun.spawn_ranks
        return run_in_processes(task, start)
    start = process_ranks.fork_ranks if forks else process_ranks.spawn_ranks
    with process_ranks.meeting_place() as task.port:
        return run_in_processes(task, start)


def _check_numbers(world_size, backend, timeout_s, eager_bytes) -> None:
    check_choice("backend", backend, BACKENDS)
    check_size("world_size", world_size)
    limit = MAX_THREAD_RANKS if backend == "threads" else MAX_PROCESS_RANKS
    require(
        world_size <= limit,
        f"at most {limit} ranks" + " in one process" * (backend == "threads"),
        f"world_size = {world_size}",
        "use fewer ranks: the lesson of a collective shows with 8",
    )
    check_timeout(timeout_s)
    require(
        eager_bytes is None or backend == "threads",
        "eager_bytes with threads only",
        f"eager_bytes = {eager_bytes!r} with backend = {backend!r}",
        "leave it out: MPI and gloo have limits of their own",
    )


def _check_program(program: Callable, args: tuple) -> None:
    asked = "program: a function whose first argument is a communicator"
    require(
        callable(program),
        asked,
        f"program = {program!r}",
        "give the function itself, run_ranks(program, 2), not the result of a call",
    )
    require(
        isinstance(args, tuple | list),
        "args: a tuple of further arguments",
        f"args = {args!r}",
        "write args=(x,) for one argument",
    )
    # Calling one of these only makes an object: no rank would ever run a line of it.
    lazy = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    require(
        not any(kind(program) for kind in lazy),
        f"{asked} and that returns a result",
        f"{program!r}, which holds yield or await",
        "collect the values in a list and return that",
    )
    try:
        signature = inspect.signature(program)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(None, *args)
    except TypeError as error:
        raise InputError(
            f"{asked}, and the others args",
            f"{getattr(program, '__name__', 'program')}{signature} for a communicator and "
            f"{len(args)} args: {error}",
            "write def program(comm, ...), and pass what it needs besides with args=(...)",
        ) from error
