"""Start a parallel program: run_ranks calls program(comm, ...) on every rank and always returns.

Chapter 00 uses it first. Ranks are threads of this process; the program says nothing of it, so it
will run unchanged where ranks are processes. Production launchers (mpirun, torchrun) start
processes on many machines and know nothing of what they run.
"""

import math
from collections.abc import Callable

from slimlab.comm.base import PayloadLedger
from slimlab.comm.threads import run_in_threads
from slimlab.config import check_size, require

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
    everywhere keeps its data in local ones.

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
    require(
        callable(program),
        "program: a function whose first argument is a communicator",
        f"program = {program!r}",
        "give the function itself, run_ranks(program, 2), not the result of a call",
    )
    check_size("world_size", world_size)
    require(
        world_size <= MAX_THREAD_RANKS,
        f"at most {MAX_THREAD_RANKS} ranks in one process",
        f"world_size = {world_size}",
        "use fewer ranks: the lesson of a collective shows with 8",
    )
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    require(
        number and timeout_s > 0 and math.isfinite(timeout_s),
        "timeout_s: a positive number of seconds",
        f"timeout_s = {timeout_s!r}",
        "run_ranks always returns, so it needs a limit; 60 is the default",
    )
    require(
        isinstance(args, tuple | list),
        "args: a tuple of further arguments",
        f"args = {args!r}",
        "write args=(x,) for one argument",
    )
    results, ledgers = run_in_threads(program, world_size, timeout_s, tuple(args))
    return RankResults(results, ledgers)
