"""How long four ranks take from start to end, beside the start of bare processes by their launcher.

    python -m benchmarks.start_up
    python -m benchmarks.start_up --quick          a few rounds, to see that it runs

A program of one all_reduce. `run_ranks` starts its ranks from this process, which has imported
torch, as a notebook has; `mpirun` of the MPI that is installed starts Python with mpi4py alone,
without torch, and those processes do the same all_reduce of one number.
"""

import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.common import Comparison, environment, parser, report, take_turns
from slimlab.comm.base import Communicator
from slimlab.comm.launch import run_ranks, why_not
from slimlab.comm.launchers import find_mpirun
from slimlab.config import require

BARE = "from mpi4py import MPI; import sys; sys.exit(MPI.COMM_WORLD.allreduce(1) != {ranks})"
LIMIT_S = 60.0


def program(comm: Communicator) -> float:
    """Add 1 over all ranks.

    comm     the communicator of all ranks
    returns  the number of ranks, the same on every rank

    Communicates: one all_reduce of 4 bytes.
    """
    return comm.all_reduce(torch.ones(1)).item()


def start_ranks(backend: str, ranks: int) -> None:
    """Start ranks by run_ranks and wait until they have ended.

    backend  "threads", "gloo" or "mpi"
    ranks    how many
    """
    results = run_ranks(program, ranks, backend=backend, timeout_s=LIMIT_S)
    require(results == [ranks] * ranks, f"{ranks} on every rank", f"{results}", "see above")


def start_bare(ranks: int) -> None:
    """Start processes with mpi4py alone by mpirun and wait until they have ended.

    ranks  how many
    """
    command = [str(find_mpirun()), "-n", str(ranks), sys.executable, "-c", BARE.format(ranks=ranks)]
    subprocess.run(command, check=True, timeout=LIMIT_S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command line `arguments`."""
    options = parser(__doc__.splitlines()[0], rounds=21)
    options.add_argument("--ranks", type=int, default=4, help="default 4")
    options.add_argument("--quick", action="store_true", help="3 rounds")
    given = options.parse_args(arguments)
    given.rounds = min(given.rounds, 3) if given.quick else given.rounds
    torch.set_num_threads(given.threads)
    reason = why_not("mpi", given.ranks)
    require(reason is None, "an MPI to compare with", f"{reason}", "python -m pip install mpich")
    where, bare = environment(given), f"mpirun, {given.ranks} ranks without torch"
    rivals = {bare: lambda: lambda: start_bare(given.ranks)}
    for backend in ("threads", "gloo", "mpi"):
        rivals[backend] = lambda backend=backend: lambda: start_ranks(backend, given.ranks)
    times = {name: tuple(parts[""]) for name, parts in take_turns(rivals, given.rounds).items()}
    comparisons = [
        Comparison(f"run_ranks, {name}", "run_ranks", bare, times[name], times[bare])
        for name in ("threads", "gloo", "mpi")
    ]
    report("start_up", {"ranks": given.ranks, "theirs": bare}, where, comparisons, given.json)


if __name__ == "__main__":
    main()
