"""How ranks that torch.distributed connects find each other: the world, and the groups in it.

Chapter 07 uses it through slimlab.comm.distributed. The world is torch's own default group, so that
a program may also call torch.distributed. Each group that is split has backends of its own, made
from the store in which its ranks find each other. torch.distributed.new_group would make them too,
but only with all ranks of the world, where a group that is split again has no others than its own.

Production programs let torch.distributed keep the groups.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from slimlab.comm.report import CommunicationError
from slimlab.config import require

THREADS = "/proc/self/task"


@dataclass(frozen=True)
class Link:
    """How one rank reaches the others of its group.

    rank        this rank in the group
    world_size  number of ranks in the group
    store       where they find each other; no other group's
    gloo        torch's backend for the host's memory
    nccl        torch's backend for GPUs, if there is one
    device      where this rank's tensors best lie
    timeout_s   after which a call gives up
    """

    rank: int
    world_size: int
    store: dist.Store
    gloo: dist.Backend
    nccl: dist.Backend | None
    device: torch.device
    timeout_s: float

    def to_group(self, name: str, rank: int, size: int) -> "Link":
        """Connect the ranks of a group that is split from this one.

        name  tells it from all others that are split from this one
        rank  this rank in the group
        size  number of ranks in the group

        Communicates: every rank of the group must call it; with NCCL they connect in their first
        collective.
        Raises CommunicationError if they do not find each other.
        """
        store, nccl = dist.PrefixStore(name, self.store), None
        timeout = timedelta(seconds=self.timeout_s)
        with _said(f"rank {rank} of the {size} of a group", self.timeout_s):
            gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
        calm_gloo()
        if self.nccl is not None:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
        return Link(rank, size, store, gloo, nccl, self.device, self.timeout_s)

    def close(self) -> None:
        """Disconnect this rank from the others of a group."""
        for backend in (self.gloo, self.nccl):
            if backend is not None:
                backend.shutdown()


def connect_world(
    backend: str,
    rank: int,
    world_size: int,
    store: dist.Store,
    timeout_s: float,
    local_rank: int,
) -> Link:
    """Connect all ranks, and make torch's default group.

    backend     "gloo" or "nccl"
    rank        this rank
    world_size  number of ranks
    store       that all ranks share
    timeout_s   after which a call gives up
    local_rank  this rank among those on its machine; with NCCL, the number of its GPU

    Communicates: every rank must call it.
    Raises InputError for an unknown backend, where there is no GPU for this rank, or where torch's
    default group is there already; CommunicationError if the ranks do not find each other.
    """
    require(
        backend in ("gloo", "nccl"),
        "backend: gloo, or nccl for GPUs",
        f"backend = {backend!r}",
        "choose one of these names",
    )
    require(
        not dist.is_initialized(),
        "a process whose torch.distributed is not connected yet",
        "one with a default process group",
        "let slimlab connect the ranks: torch.distributed can be used after that",
    )
    device = torch.device("cpu") if backend == "gloo" else own_gpu(local_rank)
    hook = sys.excepthook
    with _said(f"rank {rank} of {world_size}", timeout_s):
        dist.init_process_group(
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
            rank=rank,
            world_size=world_size,
            store=store,
            timeout=timedelta(seconds=timeout_s),
            device_id=None if backend == "gloo" else device,
        )
    sys.excepthook = hook  # torch's own puts the rank before every line of a traceback
    calm_gloo()
    world = dist.group.WORLD
    gloo = world._get_backend(torch.device("cpu"))
    nccl = None if backend == "gloo" else world._get_backend(device)
    return Link(rank, world_size, dist.PrefixStore("groups", store), gloo, nccl, device, timeout_s)


def own_gpu(local_rank: int) -> torch.device:
    """Return the GPU of this rank, and make it the current one.

    local_rank  this rank among those on its machine

    Raises InputError if there are fewer GPUs, or torch was built without NCCL.
    """
    num_gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    require(
        local_rank < num_gpus,
        "nccl: a GPU for each rank on a machine, and a torch with NCCL",
        f"local rank {local_rank}, {num_gpus} GPUs"
        + ("" if dist.is_nccl_available() else ", a torch without NCCL"),
        "start fewer ranks on this machine, or use gloo",
    )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def calm_gloo() -> None:
    """Let gloo's threads that read sockets wait for their turn.

    Such a thread skips a connection whose lock it does not get, and tries again at once. Where the
    system puts it in the place of the very thread that holds the lock, it spins for a slice of 4
    ms: with as many ranks as cores, exchanges of 16 bytes took 4 to 8 ms instead of 0.1. As a batch
    thread it displaces nobody. Does nothing where the system is not Linux.
    """
    if not hasattr(os, "SCHED_BATCH") or not os.path.isdir(THREADS):
        return
    for thread in os.listdir(THREADS):
        try:
            with open(f"{THREADS}/{thread}/comm") as file:
                if file.read().strip() == "gloo_tcp_loop":
                    os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))
        except OSError:  # the thread has ended, or the system forbids it
            continue


@contextmanager
def _said(who: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"{who} did not reach the others within {timeout_s:g} s\n"
            "it may be that a rank has not been started, has ended, or is on another machine that "
            "this one cannot reach\n"
            "change: look first at what the other ranks say. Where a machine has several networks, "
            "name the one to use: GLOO_SOCKET_IFNAME=eth0"
        ) from error
