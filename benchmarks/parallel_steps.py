"""Steps of data, ZeRO-3, tensor and pipeline parallelism beside torch.distributed's, on two ranks.

    python -m benchmarks.parallel_steps --schemes data zero tensor pipeline --shape small

A step is: logits, mean cross-entropy, gradients, one update by PyTorch's fused AdamW. Theirs are
DistributedDataParallel, fully_shard, DTensor's parallelize_module and Schedule1F1B, over gloo. Ours
run twice: over gloo too, code against code; and over MPI, to show what another transport is worth.
All rivals live in the same processes, which mpirun starts, and take turns; ranks meet before each
step, over gloo, and the time of a step is that of the slowest rank. Losses are compared first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from benchmarks.common import Comparison, environment, parser, report, take_turns
from benchmarks.parallel_rivals import (
    SHAPES,
    Step,
    Task,
    our_data,
    our_tensor,
    our_zero,
    their_data,
    their_tensor,
    their_zero,
)
from benchmarks.pipeline_rivals import our_pipeline, their_pipeline
from slimlab.comm.base import Communicator
from slimlab.comm.distributed import init_torch
from slimlab.comm.launch import why_not
from slimlab.comm.mpi_start import end_mpi, start_mpi
from slimlab.comm.mpirun import SETTINGS, find_mpirun, library_variables
from slimlab.config import check_divides, check_size, require

SCHEMES = {
    "data": (our_data, {"DDP": their_data}),
    "zero": (our_zero, {"fully_shard": their_zero}),
    "tensor": (
        our_tensor,
        {f"DTensor {plan}": partial(their_tensor, plan=plan)
         for plan in ("linears", "shared", "vocabulary")},
    ),
    "pipeline": (our_pipeline, {"Schedule1F1B": their_pipeline}),
}  # fmt: skip
# Losses of rivals that add in another order part by rounding.
TOLERANCE = 1e-4
NUM_CHECKED = 3
LIMIT_S = 900


def measure(
    scheme: str, task: Task, transports: dict[str, Communicator], rounds: int
) -> list[Comparison]:
    """Measure ours on every transport and theirs over gloo, in turns, after comparing the losses.

    scheme      a key of SCHEMES
    task        what is trained
    transports  name -> the communicator of all ranks; "gloo" is among them
    rounds      measurements of each
    """
    ours, theirs = SCHEMES[scheme]
    steps: dict[str, Step] = {f"ours, {name}": ours(task, one) for name, one in transports.items()}
    steps |= {name: make(task) for name, make in theirs.items()}
    comm, losses = transports["gloo"], {}
    for name, step in steps.items():
        found = torch.stack([step().double() for _ in range(NUM_CHECKED)])
        losses[name] = comm.all_reduce(found, op="mean")
    first = losses["ours, gloo"]
    for name, found in losses.items():
        require(
            torch.allclose(found, first, rtol=TOLERANCE),
            f"{name}: the losses of {NUM_CHECKED} steps, {first.tolist()}",
            f"{found.tolist()}",
            "correct the rival before any time is taken",
        )
    times = take_turns({name: _timed(step) for name, step in steps.items()}, rounds, warm_up=2)
    slowest = {
        name: tuple(comm.all_reduce(torch.tensor(parts[""]).double(), op="max").tolist())
        for name, parts in times.items()
    }
    return [
        Comparison(f"{scheme}: {our} beside {their}", our, their, slowest[our], slowest[their])
        for our in (f"ours, {name}" for name in transports)
        for their in theirs
    ]


def _timed(step: Step) -> Callable:
    def lap() -> dict[str, float]:
        dist.barrier()
        start = perf_counter()
        step()
        return {"": perf_counter() - start}

    return lambda: lap


def run_rank(given: argparse.Namespace) -> None:
    """Be one rank, and leave what rank 0 knows in the file given.result."""
    torch.set_num_threads(given.threads)
    MPI = start_mpi(given.ranks)
    from slimlab.comm.mpi import MPICommunicator

    world = MPI.COMM_WORLD
    store = dist.FileStore(given.result + ".store", given.ranks)
    transports = {
        "gloo": init_torch("gloo", world.rank, given.ranks, store, LIMIT_S, check=False),
        "mpi": MPICommunicator(world.Dup(), check=False),
    }
    task = Task(given.shape, given.batch_size, given.seq_len, given.vocab_size)
    rows = []
    for scheme in given.schemes:
        for one in measure(scheme, task, transports, given.rounds):
            rows.append([one.task, one.ours, one.theirs, one.ours_s, one.theirs_s])
    if world.rank == 0:
        library = MPI.Get_library_version().splitlines()[0].strip(" \0")
        Path(given.result).write_text(json.dumps({"library": library, "rows": rows}))
    for comm in transports.values():
        comm.close()
    end_mpi()


def start(given: argparse.Namespace) -> tuple[str, list[Comparison]]:
    """Start the ranks and wait; returns the MPI library's name and what was measured."""
    reason = why_not("mpi")
    require(reason is None, "ranks on mpi", f"{reason}", "install the package mpich")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [find_mpirun(), "-n", str(given.ranks), sys.executable]
        command += ["-m", "benchmarks.parallel_steps", "--result", str(result)]
        for name in ("ranks", "rounds", "threads", "shape", "batch-size", "seq-len", "vocab-size"):
            command += [f"--{name}", str(getattr(given, name.replace("-", "_")))]
        command += ["--schemes", *given.schemes]
        settings = {"OMP_NUM_THREADS": str(given.threads), **SETTINGS, **library_variables()}
        done = subprocess.run(command, env={**os.environ, **settings}, timeout=LIMIT_S)
        require(
            done.returncode == 0,
            "ranks that end well",
            f"exit code {done.returncode}",
            "see what they printed above",
        )
        found = json.loads(result.read_text())
    return found["library"], [Comparison(*row[:3], *map(tuple, row[3:])) for row in found["rows"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command line `arguments`."""
    options = parser(__doc__.splitlines()[0], rounds=41)
    options.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    options.add_argument("--shape", choices=SHAPES, default="small", help="default small")
    options.add_argument("--ranks", type=int, default=2, help="default 2")
    options.add_argument("--batch-size", type=int, default=8, help="of all ranks, default 8")
    options.add_argument("--seq-len", type=int, default=128, help="default 128")
    options.add_argument("--vocab-size", type=int, default=1280, help="default 1280")
    options.add_argument("--result", help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    for name in ("ranks", "batch_size", "seq_len", "vocab_size", "rounds"):
        check_size(name, getattr(given, name))
    check_divides("ranks", given.ranks, "batch_size", given.batch_size)
    if given.result:
        run_rank(given)
        return
    require(
        given.clock == "wall",
        "--clock wall",
        f"--clock {given.clock}",
        "a rank that waits in MPI uses as much of its processor as one that works",
    )
    where = environment(given)
    library, comparisons = start(given)
    names = ("ranks", "shape", "batch_size", "seq_len", "vocab_size")
    settings = {name: getattr(given, name) for name in names}
    settings |= {"optimizer": "fused AdamW on every side", "library": library}
    report("parallel_steps", settings, where, comparisons, given.json)


if __name__ == "__main__":
    main()
