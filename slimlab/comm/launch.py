"""Start a parallel program: run_ranks calls program(comm, ...) on every rank and always returns.

Chapter 00 uses it first. Ranks are threads of this process; the program says nothing of it, so it
will run unchanged where ranks are processes. Production launchers (mpirun, torchrun) start
processes on many machines and know nothing of what they run.
"""

import inspect
import threading
from collections.abc import Callable

from slimlab.comm.ledger import PayloadLedger
from slimlab.comm.thread_ranks import run_in_threads
from slimlab.config import InputError, check_size, require

MAX_THREAD_RANKS = 256


class RankResults(list):
    """What the program returned on every rank, in rank order.

    results  one per rank
    ledgers  one slimlab.comm.base.PayloadLedger per rank, in rank order
    """

    def __init__(self, results: list, ledgers: list[PayloadLedger]):
        super().__init__(results)
        self.ledgers = ledgers


def run_ranks(
    program: Callable, world_size: int, *, timeout_s: float = 60.0, args: tuple = ()
) -> RankResults:
    """Run program(comm, *args) on every rank and collect what it returns.

    The ranks take turns, always in the same order. Each has a torch random state of its own that
    starts as a copy of the caller's. Global variables are shared: a program that is to run
    everywhere keeps its data in local ones. Two threads that call run_ranks at the same time
    disturb each other's random states.

    program     a function of a communicator and args
    world_size  number of ranks, at most 256
    timeout_s   time allowed for all of it
    args        further arguments, the same objects for every rank
    returns     a list of one result per rank, with the ranks' ledgers as .ledgers

    Raises, all of them CommunicationError (slimlab.comm.report):
    RankError if the program raises on a rank, with the original as its __cause__;
    DeadlockError at once if no rank can go on, with what each waits for and at which line;
    MismatchError if ranks meet in different collectives, or with other shapes or operations;
    UnreceivedError if a message was sent that nobody received;
    RanksTimeoutError after timeout_s. And InputError for arguments that do not fit.
    """
    _check_program(program, args)
    check_size("world_size", world_size)
    require(
        world_size <= MAX_THREAD_RANKS,
        f"at most {MAX_THREAD_RANKS} ranks in one process",
        f"world_size = {world_size}",
        "use fewer ranks: the lesson of a collective shows with 8",
    )
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    require(
        number and 0 < timeout_s <= threading.TIMEOUT_MAX,
        "timeout_s: a positive number of seconds",
        f"timeout_s = {timeout_s!r}",
        "run_ranks always returns, so it needs a limit; 60 is the default",
    )
    results, ledgers = run_in_threads(program, world_size, timeout_s, tuple(args))
    return RankResults(results, ledgers)


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
