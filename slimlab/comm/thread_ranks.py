"""Start ranks as threads, wait until all have ended, and say what went wrong.

A part of slimlab.comm.launch; slimlab.comm.threads says what such ranks are.
"""

import ctypes
import threading
import time
from collections.abc import Callable

import torch

from slimlab.comm.interrupts import held_interrupts
from slimlab.comm.ledger import PayloadLedger
from slimlab.comm.rank_state import RandomState, RankStopped
from slimlab.comm.report import (
    RankError,
    RanksTimeoutError,
    frames_of_traceback,
    message_of,
    user_line,
)
from slimlab.comm.threads import ThreadCommunicator
from slimlab.comm.world import World
from slimlab.comm.world_report import left_over, mismatch

# How long run_in_threads waits for a rank that it asked to end, before it says that it goes on.
GRACE_S = 1.0
# How long it waits at a time while the ranks run.
WAIT_S = 0.2


def run_in_threads(
    program: Callable,
    world_size: int,
    timeout_s: float,
    args: tuple,
    eager_bytes: int | None = None,
) -> tuple[list, list[PayloadLedger]]:
    """Run program(comm, *args) in one thread per rank; arguments are taken as checked.

    program, world_size, timeout_s, args, eager_bytes  as in slimlab.comm.launch.run_ranks
    returns  the results and the ledgers, in rank order

    Raises as run_ranks does.
    """
    world = World(world_size, eager_bytes)
    comms = [ThreadCommunicator(rank, world_size, world) for rank in range(world_size)]
    results = [None] * world_size
    before, gradients = RandomState(), torch.is_grad_enabled()
    for rank, state in enumerate(world.ranks):
        state.thread = threading.Thread(
            target=_run_rank,
            args=(world, comms[rank], program, args, results, gradients),
            name=f"rank {rank}",
            daemon=True,
        )
    unfinished = None
    try:
        for state in world.ranks:
            state.thread.start()
        if not _wait_for(world.over, timeout_s):
            unfinished = world.table(running=world.turn)
    finally:
        # Also on the way out of an interrupt from the keyboard, which only this thread gets.
        with held_interrupts():
            world.stop(RankStopped())
            still_alive = _end_threads(world)
            before.restore()
    if unfinished is not None:
        raise _timeout_error(world.turn, timeout_s, unfinished, still_alive)
    _raise_what_went_wrong(world, comms)
    return results, [comm.ledger for comm in comms]


def _run_rank(
    world: World,
    comm: ThreadCommunicator,
    program: Callable,
    args: tuple,
    results: list,
    gradients: bool,
) -> None:
    try:
        try:
            world.start(comm.rank)
            torch.set_grad_enabled(gradients)  # each thread begins with them
            results[comm.rank] = program(comm, *args)
        except Exception as error:
            world.stop(_rank_error(comm.rank, error))
        world.finish(comm.rank)
    except RankStopped:
        pass
    except BaseException as error:  # sys.exit() ends a thread without a word
        world.stop(_rank_error(comm.rank, error))


def _rank_error(rank: int, error: BaseException) -> RankError:
    line = user_line(frames_of_traceback(error.__traceback__))
    wrapped = RankError(rank, f"rank {rank} raised {message_of(error)}\nat {line}")
    wrapped.__cause__ = error
    return wrapped


def _wait_for(over: threading.Event, timeout_s: float) -> bool:
    # An interrupt that reaches the process in another thread is only seen between two waits.
    deadline_s = time.monotonic() + timeout_s
    while not over.wait(min(WAIT_S, max(0.0, deadline_s - time.monotonic()))):
        if time.monotonic() >= deadline_s:
            return False
    return True


def _end_threads(world: World) -> list[int]:
    """Wait until the ranks end, interrupt one that computes on, and list those that do not end."""
    deadline_s = time.monotonic() + GRACE_S
    for state in world.ranks:
        if state.thread.ident is None:  # never started
            continue
        state.thread.join(0.05)
        with world.lock:
            if state.thread.is_alive() and not state.finished:
                # Raises in that thread before its next Python instruction: enough for an endless
                # loop, not for one that sleeps or waits in C.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(state.thread.ident), ctypes.py_object(RankStopped)
                )
        state.thread.join(max(0.0, deadline_s - time.monotonic()))
    return [rank for rank, state in enumerate(world.ranks) if state.thread.is_alive()]


def _timeout_error(
    running: int, timeout_s: float, table: str, still_alive: list[int]
) -> RanksTimeoutError:
    fate = f"Rank {running} was ended."
    if still_alive:
        fate = (
            f"Rank {', '.join(map(str, still_alive))} goes on in the background, since a thread "
            "cannot be killed: restart the kernel if it does not end by itself."
        )
    return RanksTimeoutError(
        f"the ranks had not finished after {timeout_s:g} s\n{table}\n"
        f"change: look for a loop without an end at the line of rank {running}, or give a larger "
        f"timeout_s. {fate}"
    )


def _raise_what_went_wrong(world: World, comms: list[ThreadCommunicator]) -> None:
    if world.error is not None:
        raise world.error
    for meeting in world.meetings.values():
        # Somebody came without waiting for the others, who never did.
        raise mismatch(meeting)
    unwaited = [comm.progress.unwaited() for comm in comms]
    left = left_over(world.mail, world.groups, unwaited)
    if left is not None:
        raise left
