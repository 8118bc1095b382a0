"""Programs that go wrong, and the runtimes on which each can: a table for tests and for the docs.

Each case is a program for two or three ranks with what the one message must say. Under run_ranks
the message is an error; a program started from outside (by mpirun or torchrun) prints it, and this
file is that program:

    mpirun -n 2 python tests/failure_cases.py raises

Without a name it measures all of them, for the docs.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comm_runtimes import MPIRUN, started_by

from slimlab.comm.connect import connect
from slimlab.comm.launch import run_ranks
from slimlab.comm.report import (
    CommunicationError,
    DeadlockError,
    MismatchError,
    RankError,
    RanksTimeoutError,
)

# Of the time limit itself, where nothing but the limit can tell.
TIMEOUT_S = 2.0
# The time limit of run_ranks holds for the start too, which takes longer on a busy machine.
START_S = {"threads": 0.0, "gloo": 0.5, "mpich": 1.0, "openmpi": 3.0}
# Of all others, which must be found before; starting three ranks of Open MPI takes two seconds.
LATE_S = 30.0
PROCESSES = ("gloo", "mpich", "openmpi")
EVERYWHERE = ("threads", *PROCESSES)
# Runtimes on which the programs are started from outside.
OUTSIDE = {"mpirun of MPICH": "mpich", "mpirun of Open MPI": "openmpi", "torchrun": "gloo"}


@dataclass(frozen=True)
class Case:
    """A program that goes wrong.

    program     for run_ranks
    error       that run_ranks raises
    says        what the message must hold
    what        for the table of the docs
    timeout_s   for run_ranks and connect
    world_size  number of ranks
    runtimes    on which it can happen under run_ranks
    outside     runtimes on which it is tested as a program started from outside
    on_threads  what threads raise and say, if it is something else
    """

    program: Callable
    error: type[CommunicationError]
    says: tuple[str, ...]
    what: str
    timeout_s: float = LATE_S
    world_size: int = 2
    runtimes: tuple[str, ...] = EVERYWHERE
    outside: tuple[str, ...] = ()
    on_threads: tuple = field(default=())


def raises(comm):
    comm.barrier()
    if comm.rank == 1:
        raise ValueError("out of powder")
    comm.barrier()


def is_killed(comm):
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.5)  # so that its reports have shown this line
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()


def exits_at_once(comm):
    comm.barrier()
    if comm.rank == 1:
        os._exit(3)
    comm.barrier()


def leaves(comm):
    comm.barrier()
    if comm.rank == 1:
        sys.exit(0)
    comm.barrier()


def loops(comm):
    while comm.rank == 1:
        pass
    comm.barrier()


def loops_in_c(comm):
    if comm.rank == 1:
        all(itertools.repeat(True))  # no other thread of this process runs any more
    comm.barrier()


def calls_another_collective(comm):
    if comm.rank == 1:
        comm.barrier()
    else:
        comm.all_reduce(torch.ones(2))


def brings_another_shape(comm):
    comm.all_reduce(torch.ones(3 if comm.rank == 1 else 2))


def brings_another_dtype(comm):
    comm.all_reduce(torch.ones(2, dtype=torch.int64 if comm.rank == 1 else torch.float32))


def names_another_root(comm):
    comm.broadcast(torch.ones(2), src=1 if comm.rank == 1 else 0)


def skips_a_call(comm):
    comm.barrier()
    if comm.rank != 1:
        comm.all_reduce(torch.ones(2))


def starts_another_collective(comm):
    if comm.rank == 1:
        started = comm.all_reduce(torch.ones(2), async_op=True)
        comm.recv(0)
        started.wait()
    else:
        comm.barrier()
        comm.send(torch.ones(2), 1)


def sends_first(comm):
    # Small messages pass on most runtimes, since the receiver's side keeps them.
    comm.send(torch.ones(2**21), 1 - comm.rank)
    comm.recv(1 - comm.rank)


def receives_first(comm):
    comm.recv(1 - comm.rank)
    comm.send(torch.ones(2), 1 - comm.rank)


def takes_the_wrong_tag(comm):
    if comm.rank == 0:
        comm.send(torch.ones(2), 1, tag=3)
    else:
        comm.recv(0, tag=4)


def asks_a_rank_that_does_not_exist(comm):
    comm.barrier()
    comm.recv(7)


def prints_a_megabyte(comm):
    if comm.rank == 1:
        print("x" * 2**20)
        raise ValueError("said too much")
    comm.barrier()


CASES = {
    "raises": Case(
        raises, RankError,
        ("rank 1 raised ValueError: out of powder", "of raises: raise ValueError("),
        "a rank raises", outside=("mpirun of Open MPI", "torchrun"),
    ),
    "is killed": Case(
        is_killed, RankError,
        ("rank 1 ", "of is_killed: time.sleep(0.5)", "of is_killed: comm.barrier()"),
        "a rank is killed with -9", runtimes=PROCESSES, outside=tuple(OUTSIDE),
    ),
    "exits at once": Case(
        exits_at_once, RankError, ("rank 1 ", "before its program had finished"),
        "a rank calls os._exit(3)", runtimes=PROCESSES, outside=("mpirun of MPICH",),
    ),
    "leaves": Case(
        leaves, RankError, ("rank 1 raised SystemExit: 0", "of leaves: sys.exit(0)"),
        "a rank calls sys.exit(0)",
    ),
    "loops": Case(
        loops, RanksTimeoutError, ("1     computes", "of loops: ", "waits in barrier()"),
        "a rank loops for ever", timeout_s=TIMEOUT_S,
    ),
    "loops in C": Case(
        loops_in_c, RanksTimeoutError,
        ("1     does not answer since", "of loops_in_c: all(itertools.repeat(True))"),
        "a rank loops for ever in C", timeout_s=TIMEOUT_S + 1.0, runtimes=PROCESSES,
        outside=("mpirun of MPICH",),
    ),
    "calls another collective": Case(
        calls_another_collective, MismatchError,
        ("1     ", "barrier()", "all_reduce(float32 (2,), op=sum)", "the odd one: rank 1",
         "of calls_another_collective: comm.barrier()"),
        "another collective", world_size=3, outside=("mpirun of MPICH",),
    ),
    "brings another shape": Case(
        brings_another_shape, MismatchError,
        ("float32 (3,)", "the odd one: rank 1", "of brings_another_shape: comm.all_reduce("),
        "another shape", world_size=3,
    ),
    "brings another dtype": Case(
        brings_another_dtype, MismatchError,
        ("int64 (2,)", "the odd one: rank 1", "of brings_another_dtype: comm.all_reduce("),
        "another dtype", world_size=3,
    ),
    "names another root": Case(
        names_another_root, MismatchError,
        ("src=1", "the odd one: rank 1", "of names_another_root: comm.broadcast("),
        "another root", world_size=3,
    ),
    "skips a call": Case(
        skips_a_call, MismatchError,
        ("1     has finished", "of skips_a_call: comm.all_reduce(", "the odd one: rank 1"),
        "a rank skips one call", world_size=3,
        on_threads=(DeadlockError, ("1     has finished", "missing: rank 1")),
    ),
    "starts another collective": Case(
        starts_another_collective, MismatchError,
        ("barrier()", "all_reduce(float32 (2,), op=sum, async)", "of starts_another_collective: "),
        "a started collective against another",
    ),
    "sends first": Case(
        sends_first, DeadlockError,
        ("0     waits in send(dst=1", "rank 1: rank 0 does not receive with tag 0",
         "of sends_first: comm.send("),
        "send against send, above the eager size", outside=("mpirun of Open MPI",),
    ),
    "receives first": Case(
        receives_first, DeadlockError,
        ("0     waits in recv(src=1", "rank 1: no message with tag 0 from rank 0 is under way",
         "of receives_first: comm.recv("),
        "receive against receive",
    ),
    "takes the wrong tag": Case(
        takes_the_wrong_tag, DeadlockError,
        ("rank 1: no message with tag 4 from rank 0 is under way", "with tag 3 from rank 0 lies",
         "of takes_the_wrong_tag: comm.recv(0, tag=4)"),
        "the wrong tag",
    ),
    "asks a rank that does not exist": Case(
        asks_a_rank_that_does_not_exist, RankError,
        ("rank 0 raised InputError", "src = 7 on rank 0 of 2", "comm.recv(7)"),
        "receive from a rank that does not exist",
    ),
    "prints a megabyte": Case(
        prints_a_megabyte, RankError, ("rank 1 raised ValueError: said too much",),
        "a rank prints a megabyte, then raises", outside=("mpirun of MPICH",),
    ),
}  # fmt: skip


def run_case(name: str, runtime: str) -> tuple[BaseException | None, float]:
    """Run a case under run_ranks; returns what it raised, and after how many seconds."""
    case, start_s = CASES[name], time.monotonic()
    options = {"eager_bytes": 2**16} if runtime == "threads" else {}
    timeout_s = case.timeout_s + START_S[runtime]
    try:
        with started_by(runtime) as backend:
            run_ranks(
                case.program, case.world_size, backend=backend, timeout_s=timeout_s, **options
            )
    except CommunicationError as error:
        return error, time.monotonic() - start_s
    return None, time.monotonic() - start_s


def run_outside(name: str, launcher: str) -> tuple[subprocess.CompletedProcess, float]:
    """Run a case as a program started from outside; returns what it said, and the seconds."""
    case, start_s = CASES[name], time.monotonic()
    done = subprocess.run(
        [*command(launcher, case.world_size), __file__, name],
        env=environment(launcher),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - start_s


def command(launcher: str, world_size: int) -> list[str]:
    """The command that starts a Python program on several ranks, but for the program."""
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node", str(world_size)]
    options = ["--allow-run-as-root", "--oversubscribe"] * (launcher == "mpirun of Open MPI")
    return [str(MPIRUN[OUTSIDE[launcher]]), *options, "-n", str(world_size), sys.executable]


def environment(launcher: str) -> dict[str, str]:
    """The environment in which the command is started."""
    if launcher != "mpirun of Open MPI":
        return dict(os.environ)
    libraries = MPIRUN["openmpi"].parents[1] / "lib"
    return os.environ | {"MPI4PY_MPIABI": "openmpi", "LD_LIBRARY_PATH": str(libraries)}


def table() -> str:
    """Measure every case on every runtime that it is tested on: seconds to the end, as Markdown."""
    launchers = [*EVERYWHERE, *OUTSIDE]
    lines = [" | ".join(["", "what goes wrong", *launchers, ""]).strip()]
    lines.append("|".join(["", "---", *["---:"] * len(launchers), ""]))
    for name, case in CASES.items():
        seconds = [
            f"{run_case(name, runtime)[1]:.1f}" if runtime in case.runtimes else "\u2013"
            for runtime in EVERYWHERE
        ]
        seconds += [
            f"{run_outside(name, launcher)[1]:.1f}" if launcher in case.outside else ""
            for launcher in OUTSIDE
        ]
        lines.append(" | ".join(["", case.what, *seconds, ""]).strip())
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        case = CASES[sys.argv[1]]
        case.program(connect(timeout_s=case.timeout_s if case.timeout_s < LATE_S else 20.0))
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            text = table()
        print(text)
