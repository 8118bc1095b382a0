"""Where a rank runs: host, process, device, and the libraries that carry its messages.

The demos say it first, since a program that runs elsewhere than one believes explains nothing;
slimlab.comm.calibrate keeps it beside what it measured. Production jobs print the same into the
head of their logs.
"""

import os
import platform
import socket
from dataclasses import dataclass

import torch

from slimlab.comm.base import Communicator


@dataclass(frozen=True)
class Place:
    """Where one rank runs.

    rank     of the world
    host     name of the machine
    pid      number of the process; threads share one
    device   where its tensors best lie
    backend  "threads", "mpi", "gloo" or "nccl"
    library  what carries its messages, with its version
    """

    rank: int
    host: str
    pid: int
    device: str
    backend: str
    library: str


def place_of(comm: Communicator) -> Place:
    """Return where this rank runs.

    comm  its communicator

    Communicates: nothing.
    """
    return Place(
        comm.ranks[comm.rank],
        socket.gethostname(),
        os.getpid(),
        device_name(comm.device),
        comm.backend,
        library_of(comm.backend),
    )


def device_name(device: torch.device) -> str:
    """Return a device as people call it: cpu, or cuda:1 and the name of the GPU.

    device  any
    """
    if device.type != "cuda":
        return str(device)
    return f"{device} {torch.cuda.get_device_name(device)}"


def library_of(backend: str) -> str:
    """Return what carries the messages of a backend in this process, with its version.

    backend  "threads", "mpi", "gloo" or "nccl"; for "mpi" this process must be a rank of MPI
    """
    if backend == "mpi":
        from mpi4py import MPI

        # "MPICH Version:      5.0.2", or "Open MPI v5.0.11, package: ...".
        text = MPI.Get_library_version().partition("\0")[0]
        first = text.partition("\n")[0].partition(",")[0]
        return " ".join(first.replace("Version:", "").split())
    if backend == "nccl":
        return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    if backend == "gloo":
        return f"gloo of torch {torch.__version__}"
    return f"threads of Python {platform.python_version()}"
