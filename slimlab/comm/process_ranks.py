"""Start ranks as processes of this machine, connected by gloo or NCCL.

A part of slimlab.comm.launch. A fork of a process that has imported torch is ready in milliseconds
and knows the caller's functions and random states. Where a fork is not safe (a GPU is in use, or
the system is not Linux) a fresh Python takes its place, and takes two seconds to import torch.

Production launchers (mpirun, torchrun) start programs on many hosts; these ranks stay on this one.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from slimlab.comm.processes import Run, close_all
from slimlab.comm.rank_process import LOCALHOST, Task
from slimlab.comm.shipping import Surroundings, name_classes, pack

ENTRY = (
    "import sys; sys.path[:] = {path!r}; "
    "from slimlab.comm.rank_process import run_spawned; run_spawned()"
)


def why_no_fork(backend: str) -> str | None:
    """Tell why this process must not be forked for ranks, or None if it may.

    backend  that connects the ranks
    """
    if sys.platform != "linux":
        return "forks are safe on Linux only"
    if torch.cuda.is_initialized():
        return "this process uses a GPU, which its forks cannot"
    if backend != "mpi" and torch.distributed.is_initialized():
        return "this process is connected by torch.distributed, as its forks would seem to be"
    mpi = sys.modules.get("mpi4py.MPI")
    if backend == "mpi" and mpi is not None and mpi.Is_initialized():
        return "this process has started MPI, which its forks cannot"
    return None


def why_no_nccl(world_size: int) -> str | None:
    """Tell why NCCL cannot connect ranks here, or None if it can.

    world_size  number of ranks; each needs a GPU
    """
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return "this torch was built without NCCL"
    num_gpus = torch.cuda.device_count()
    return None if world_size <= num_gpus else f"{world_size} ranks need a GPU each, of {num_gpus}"


@contextmanager
def meeting_place() -> Iterator[int]:
    """Host the store where ranks of gloo and NCCL find each other, for the length of a with block.

    It lies in the caller's process, so it outlives every rank, and listens on this machine only.

    returns  its port, a free one
    """
    listener = socket.create_server((LOCALHOST, 0))
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore(
        LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    try:
        yield port
    finally:
        del store


def fork_ranks(run: Run, task: Task) -> None:
    """Start all ranks as forks of this process.

    run   takes the ranks
    task  what they are to do
    """
    name_classes(task.program, task.args)
    for rank in range(task.world_size):
        run.fork(task, rank, rank_variables(rank, task.world_size))


def spawn_ranks(run: Run, task: Task) -> None:
    """Start all ranks as fresh Pythons.

    run   takes the ranks
    task  what they are to do

    Raises what pickling raises if program or args cannot travel.
    """
    with packed(task) as payload:
        for rank in range(task.world_size):
            one, lines = run.add(rank)
            numbers = [rank, *lines.all(), payload.fileno(), os.getpid()]
            child = subprocess.Popen(
                spawn_command(numbers),
                pass_fds=[*lines.all(), payload.fileno()],
                env=os.environ | rank_variables(rank, task.world_size),
                start_new_session=True,
            )
            one.pid, child.returncode = child.pid, 0  # this class waits for it, not Popen
            close_all(lines.all())


def packed(task: Task) -> tempfile.SpooledTemporaryFile:
    """Write a task into a file without a name, for ranks that are not forked.

    task  what they are to do
    """
    task.surroundings = Surroundings(task.program)
    payload = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    payload.write(pack(task))
    payload.flush()
    return payload


def spawn_command(numbers: Sequence[int]) -> list[str]:
    """Return the command of a fresh Python that becomes a rank.

    numbers  what slimlab.comm.rank_process.run_spawned takes
    """
    return [sys.executable, "-c", ENTRY.format(path=sys.path), *map(str, numbers)]


def rank_variables(rank: int, world_size: int) -> dict[str, str]:
    """Return the environment variables by which libraries know a rank.

    rank        its number
    world_size  number of ranks
    """
    size = str(world_size)
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    names |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # gloo would look for the interface that the machine's name belongs to, which may not exist.
    names["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return names
