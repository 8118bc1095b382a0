"""Look after ranks that are processes: collect what they send, and say what went wrong.

A part of slimlab.comm.launch. The caller's process keeps the board (slimlab.comm.board), so it
lives longer than any rank, and it is told by the system when a rank's process ends.
"""

import select
import sys
import time
from collections.abc import Callable

from slimlab.comm.board import Board, Verdict
from slimlab.comm.channel import Channel
from slimlab.comm.interrupts import held_interrupts
from slimlab.comm.processes import REAP_S, Run, open_standard_files
from slimlab.comm.rank_process import Task
from slimlab.comm.report import (
    CommunicationError,
    DeadlockError,
    MismatchError,
    RankError,
    RanksTimeoutError,
)
from slimlab.comm.shipping import unpack
from slimlab.config import InputError

# How long the caller waits at a time; what a rank sends, and its end, are noticed at once.
WAIT_S = 0.1
ERRORS = {"deadlock": DeadlockError, "mismatch": MismatchError, "timeout": RanksTimeoutError}


def run_in_processes(task: Task, start: Callable[["Run", Task], None]) -> tuple[list, list]:
    """Run a task in one process per rank; what it holds is taken as checked.

    task     what the ranks are to do
    start    starts them: fork_ranks, spawn_ranks or one of slimlab.comm.mpirun
    returns  the results and the ledgers, in rank order

    Raises as slimlab.comm.launch.run_ranks does.
    """
    open_standard_files()
    run, board, verdict, well = Run(), Board(task.world_size, None), None, False
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        start(run, task)
        verdict = watch_ranks(run, board, task.timeout_s)
        well = verdict is None
    finally:
        # Also on the way out of an interrupt from the keyboard.
        with held_interrupts():
            run.end(kindly=well)
        run.show()
    if verdict is not None:
        raise error_of(verdict, board)
    pairs = [unpack(board.results[rank]) for rank in range(task.world_size)]
    return [result for result, _ in pairs], [ledger for _, ledger in pairs]


def error_of(verdict: Verdict, board: Board) -> BaseException:
    """Turn a verdict into the error that run_ranks raises.

    verdict  what went wrong
    board    what the ranks told
    """
    if verdict.kind in ERRORS:
        return ERRORS[verdict.kind](verdict.message)
    wrapped = RankError(verdict.rank, verdict.message)
    if verdict.kind == "ended":
        return wrapped
    words, blob = board.raised[verdict.rank][1:]
    cause = unpack(blob) if blob else None
    # What all ranks have found out together needs no rank, nor does a rank that could not connect.
    together = words["ours"] and isinstance(cause, CommunicationError)
    if together or (words["starts"] and isinstance(cause, InputError)):
        return cause
    if cause is None:
        return RankError(verdict.rank, f"{verdict.message}\n{words['traceback']}")
    cause.add_note(f"\nOn rank {verdict.rank}:\n{words['traceback']}")
    wrapped.__cause__ = cause
    return wrapped


def watch_ranks(run: Run, board: Board, timeout_s: float) -> Verdict | None:
    """Look after the ranks until all have sent their results, or something goes wrong.

    run        the ranks
    board      keeps what they tell
    timeout_s  time allowed for all of it
    returns    None if all went well
    """
    board.channels = {rank: one.channel for rank, one in run.ranks.items()}
    deadline_s = time.monotonic() + timeout_s
    verdict = None
    while verdict is None and len(board.results) < len(run.ranks):
        _take_what_came(run, board, min(WAIT_S, max(0.0, deadline_s - time.monotonic())))
        now_s = time.monotonic()
        for rank, one in run.ranks.items():
            one.look()
            if one.ended is not None:
                board.read(rank, now_s)
                board.note_end(rank, one.ended, now_s)
        verdict = board.verdict(now_s)
        if verdict is None and now_s > deadline_s:
            verdict = board.deadlock(now_s, last_chance=True) or _timeout(board, timeout_s, now_s)
    return verdict


def _take_what_came(run: Run, board: Board, wait_s: float) -> None:
    poll, owners = select.poll(), {}
    for rank, one in run.ranks.items():
        for line in (one.channel, *one.outputs):
            if line.open:
                poll.register(line, select.POLLIN)
                owners[line.fileno()] = rank, line
    # A channel that has closed says that its process ends; that is seen a moment later.
    closing = any(not one.channel.open and one.ended is None for one in run.ranks.values())
    for number, _ in poll.poll(1000 * (REAP_S if closing else wait_s)):
        rank, line = owners[number]
        if isinstance(line, Channel):
            board.read(rank, time.monotonic())
        else:
            line.read()


def _timeout(board: Board, timeout_s: float, now_s: float) -> Verdict:
    return Verdict(
        "timeout",
        f"the ranks had not finished after {timeout_s:g} s\n{board.table(now_s)}\n"
        "change: look at the odd rank's line for a loop without an end or a call that the others "
        "do not make, or give a larger timeout_s. All ranks were ended.",
    )
