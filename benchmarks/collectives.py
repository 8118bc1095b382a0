"""The all_reduces of the book beside those of MPI and of gloo, two ranks, from 1 KiB to 64 MiB.

    python -m benchmarks.collectives --runtime mpi gloo --rounds 21

Ours are written with send and receive only, theirs are MPI_Allreduce, as mpi4py calls it, and
torch.distributed.all_reduce. All work in place, on float32. Ours run twice: on "bare" messages, the
library's own and nothing around them, so that an algorithm is compared with an algorithm; and on
the book's communicator, whose messages also say what they are, are checked and stand in a ledger.

The program starts the ranks itself, those of MPI and of gloo apart: a rank that waits in MPI keeps
a core busy. Where memory for long tensors comes from weighs as much as the algorithm, so MPI is
measured under two settings of the C library's allocator: as it is, and keeping what was freed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.common import Comparison, environment, parser, report, take_turns
from slimlab.comm.collectives import (
    rabenseifner_all_reduce,
    recursive_doubling_all_reduce,
    ring_all_reduce,
)
from slimlab.comm.launch import why_not
from slimlab.comm.mpi_start import end_mpi, start_mpi
from slimlab.comm.mpirun import SETTINGS, find_mpirun, library_variables
from slimlab.config import check_size, require

OURS = {
    "ring": ring_all_reduce,
    "Rabenseifner": rabenseifner_all_reduce,
    "doubling": recursive_doubling_all_reduce,
}
DOUBLING_UP_TO = 2**18
SIZES = [2**power for power in range(10, 27, 2)]
QUICK_SIZES = [2**10, 2**20]
# Memory of a MiB and more comes straight from the kernel, and goes back when it is freed: each call
# that needs a buffer pays for its pages again. These numbers let the C library keep it.
KEEPS = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
ALLOCATORS = {"default": {}, "keeps": KEEPS}
MESSAGES = ("bare", "communicator")
RUNTIMES = ("mpi", "gloo")
LIMIT_S = 900


class BareMPI:
    """Messages of MPI with nothing around them, as far as the all_reduces of two ranks need them.

    mpi_comm  a communicator of MPI that nobody else uses
    """

    def __init__(self, mpi_comm):
        from mpi4py import MPI

        self._comm, self._memory = mpi_comm, MPI.buffer.fromaddress
        self.rank, self.world_size = mpi_comm.rank, mpi_comm.size

    def sendrecv(self, tensor: Tensor, dst: int, src: int, tag: int, *, out: Tensor) -> Tensor:
        """Send `tensor` to `dst` and receive `out` from `src`, with this `tag`."""
        given = self._memory(tensor.data_ptr(), tensor.nbytes)
        taken = self._memory(out.data_ptr(), out.nbytes)
        self._comm.Sendrecv(given, dst, tag, taken, src, tag)
        return out


class BareGloo:
    """Messages of torch.distributed with nothing around them."""

    def __init__(self):
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def sendrecv(self, tensor: Tensor, dst: int, src: int, tag: int, *, out: Tensor) -> Tensor:
        """Send `tensor` to `dst` and receive `out` from `src`, with this `tag`."""
        arrives = torch.distributed.irecv(out, src, tag=tag)
        leaves = torch.distributed.isend(tensor, dst, tag=tag)
        arrives.wait()
        leaves.wait()
        return out


class Ranks:
    """One rank's way to the others: both kinds of messages, their all_reduce, and a barrier.

    runtime  one of RUNTIMES; MPI was started by mpirun, gloo finds the others by `store`
    store    a file that all ranks can reach
    rank     of this process, for gloo
    number   of ranks
    """

    def __init__(self, runtime: str, store: Path, rank: int, number: int):
        if runtime == "mpi":
            MPI = start_mpi(number)
            from slimlab.comm.mpi import MPICommunicator

            world = MPI.COMM_WORLD
            self.communicator = MPICommunicator(world.Dup(), check=False)
            self.bare, self.barrier = BareMPI(world.Dup()), world.Barrier
            self._memory, self._world, self._in_place = MPI.buffer.fromaddress, world, MPI.IN_PLACE
            self._float, self.theirs = MPI.FLOAT, "MPI_Allreduce"
            self.library = MPI.Get_library_version().splitlines()[0].strip(" \0")
        else:
            from slimlab.comm.distributed import init_torch

            shared = torch.distributed.FileStore(str(store), number)
            self.communicator = init_torch("gloo", rank, number, shared, LIMIT_S, check=False)
            self.bare, self.barrier = BareGloo(), torch.distributed.barrier
            self.theirs, self.library = "gloo's", "gloo"
        self.runtime = runtime
        self.rank, self.world_size = self.bare.rank, self.bare.world_size

    def their_all_reduce(self, tensor: Tensor) -> Callable[[], object]:
        """Return what adds `tensor` up over the ranks, in place, by the library's own means."""
        if self.runtime == "gloo":
            return lambda: torch.distributed.all_reduce(tensor)
        buffer = [self._memory(tensor.data_ptr(), tensor.nbytes), self._float]
        return lambda: self._world.Allreduce(self._in_place, buffer)

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Return, one by one, the largest of all ranks' `seconds`."""
        return self.communicator.all_reduce(torch.tensor(seconds).double(), op="max").tolist()

    def close(self) -> None:
        """End the runtime."""
        self.communicator.close()
        if self.runtime == "mpi":
            end_mpi()


def measure(ranks: Ranks, n_bytes: int, messages: Sequence[str], rounds: int) -> list[Comparison]:
    """Measure all algorithms at one length, in turns, after checking that they add right.

    ranks     the way to the others
    n_bytes   of the tensor
    messages  some of MESSAGES
    rounds    measurements of each
    """
    tensor = torch.zeros(n_bytes // 4)
    work = torch.empty(len(tensor) + 1)
    runs = {(ranks.theirs, ""): ranks.their_all_reduce(tensor)}
    for kind in messages:
        comm = ranks.bare if kind == "bare" else ranks.communicator
        for name, function in OURS.items():
            if name != "doubling" or n_bytes <= DOUBLING_UP_TO:
                runs[name, kind] = lambda comm=comm, function=function: function(
                    comm, tensor, out=tensor, work=work
                )
    values = torch.arange(len(tensor), dtype=torch.float32) % 97
    for (name, kind), run in runs.items():
        tensor.copy_(values * (ranks.rank + 1))
        run()
        total = ranks.world_size * (ranks.world_size + 1) / 2
        require(
            torch.equal(tensor, values * total),
            f"{name} {kind}: the sum of all ranks' tensors",
            f"{tensor[:4].tolist()}...",
            "correct the collective before any time is taken",
        )
    tensor.zero_()  # zeros stay zeros, however often they are added up
    times = take_turns({name: _timed(ranks, run, n_bytes) for name, run in runs.items()}, rounds)
    slowest = {name: tuple(ranks.slowest(parts[""])) for name, parts in times.items()}
    theirs = slowest.pop((ranks.theirs, ""))
    return [
        Comparison(f"{_size(n_bytes)} {name}, {kind}", name, ranks.theirs, seconds, theirs)
        for (name, kind), seconds in slowest.items()
    ]


def _timed(ranks: Ranks, run: Callable[[], object], n_bytes: int) -> Callable:
    """Return what take_turns calls: enough calls for a millisecond, after all ranks have come."""
    calls = max(1, min(50, 2**20 // n_bytes))

    def lap() -> dict[str, float]:
        ranks.barrier()
        start = perf_counter()
        for _ in range(calls):
            run()
        return {"": (perf_counter() - start) / calls}

    return lambda: lap


def _size(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 2**20 else f"{n_bytes >> 10} KiB"


def run_rank(given: argparse.Namespace) -> None:
    """Be one rank of a measurement, and leave what rank 0 knows in the file given.result."""
    torch.set_num_threads(given.threads)
    ranks = Ranks(given.one_of, Path(given.result + ".store"), given.rank, given.ranks)
    rows = []
    for n_bytes in given.sizes:
        for one in measure(ranks, n_bytes, given.messages, given.rounds):
            task = f"{given.one_of}, {given.allocator[0]}, {one.task}"
            rows.append([task, one.ours, one.theirs, one.ours_s, one.theirs_s])
    if ranks.rank == 0:
        Path(given.result).write_text(json.dumps({"library": ranks.library, "rows": rows}))
    ranks.close()


def start(runtime: str, allocator: str, given: argparse.Namespace) -> tuple[str, list[Comparison]]:
    """Start the ranks of one measurement and wait for its result.

    runtime    one of RUNTIMES
    allocator  a key of ALLOCATORS
    given      the options of the command line
    returns    the library's name for itself, and what was measured
    """
    reason = why_not(runtime)
    require(reason is None, f"ranks on {runtime}", f"{reason}", "measure with another --runtime")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.collectives", "--one-of", runtime]
        command += ["--allocator", allocator, "--result", str(result), "--ranks", str(given.ranks)]
        command += ["--rounds", str(given.rounds), "--threads", str(given.threads)]
        command += ["--sizes", *map(str, given.sizes), "--messages", *given.messages]
        # glibc reads these when a program starts, so they cannot be set from inside.
        settings = {"OMP_NUM_THREADS": str(given.threads), **ALLOCATORS[allocator]}
        if runtime == "mpi":
            commands = [[find_mpirun(), "-n", str(given.ranks), *command]]
            settings |= {**SETTINGS, **library_variables()}
        else:
            commands = [[*command, "--rank", str(rank)] for rank in range(given.ranks)]
        started = [subprocess.Popen(one, env={**os.environ, **settings}) for one in commands]
        try:
            codes = [process.wait(timeout=LIMIT_S) for process in started]
        finally:
            for process in started:
                process.terminate()
                process.wait()
        require(
            not any(codes),
            f"ranks on {runtime} that end well",
            f"exit codes {codes}",
            "see what they printed above",
        )
        found = json.loads(result.read_text())
    comparisons = [Comparison(*row[:3], *map(tuple, row[3:])) for row in found["rows"]]
    return found["library"], comparisons


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command line `arguments`."""
    options = parser(__doc__.splitlines()[0], rounds=21)
    options.add_argument("--runtime", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    options.add_argument("--messages", nargs="+", choices=MESSAGES, default=list(MESSAGES))
    options.add_argument("--ranks", type=int, default=2, help="default 2")
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of a tensor")
    options.add_argument("--quick", action="store_true", help="3 rounds of 1 KiB and 1 MiB")
    options.add_argument(
        "--allocator",
        nargs="+",
        choices=ALLOCATORS,
        default=list(ALLOCATORS),
        help="of MPI's ranks",
    )
    for private in ("--one-of", "--result"):
        options.add_argument(private, help=argparse.SUPPRESS)
    options.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    check_size("ranks", given.ranks)
    if given.quick:
        given.rounds, given.sizes = min(given.rounds, 3), QUICK_SIZES
    if given.one_of:
        run_rank(given)
        return
    require(
        given.clock == "wall",
        "--clock wall",
        f"--clock {given.clock}",
        "a rank that waits in MPI uses as much of its processor as one that works",
    )
    where, libraries, comparisons = environment(given), [], []
    for runtime in given.runtime:
        for allocator in given.allocator if runtime == "mpi" else ["default"]:
            library, rows = start(runtime, allocator, given)
            libraries.append(library)
            comparisons += rows
    keeps = " ".join(f"{name}={value}" for name, value in KEEPS.items())
    settings = {"ranks": given.ranks, "keeps": keeps, "libraries": sorted(set(libraries))}
    report("collectives", settings, where, comparisons, given.json)


if __name__ == "__main__":
    main()
