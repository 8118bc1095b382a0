"""Connect a program that was started from outside: by mpirun, srun, torchrun, or by nobody.

The first lines of such a program are

    from slimlab.comm.connect import connect

    comm = connect()

and the rest is what run_ranks would run. Chapter 07 starts one program in all these ways. From
connect() on the ranks are watched (slimlab.comm.keeper): if one raises, is killed, or waits too
long, one message says which, and all of them end.

Production programs call MPI_Init or init_process_group, and are told less.
"""

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta

import torch
from torch import distributed as dist

from slimlab.comm.base import Communicator
from slimlab.comm.calls import check_timeout
from slimlab.comm.channel import Channel
from slimlab.comm.keeper import start_keeper
from slimlab.comm.launchers import Launcher, launcher_of
from slimlab.comm.report import CommunicationError
from slimlab.comm.session import LATER_S, LOCALHOST, look_after
from slimlab.comm.threads import ThreadCommunicator
from slimlab.comm.watch import Watch
from slimlab.comm.world import World
from slimlab.config import check_choice

HOST_VARIABLE = "SLIMLAB_HOST"
REACH_S = 20.0
_CONNECTED: dict[str, Communicator] = {}


def connect(
    timeout_s: float = 60.0, check: bool = True, *, backend: str | None = None
) -> Communicator:
    """Connect this process to the other ranks of its program, and let all of them be watched.

    At the end of the program every rank waits for the others. Called again it returns the same.

    timeout_s  how long a rank may wait in one call before all are ended
    check      compare the ranks' calls before each collective
    backend    under torchrun "gloo" or "nccl"; None: nccl if every rank here has a GPU, else gloo
    returns    the communicator of this rank: over MPI under mpirun and srun, over torch.distributed
               under torchrun, and of a world of one if nobody has started more

    Communicates: every rank must call it.
    Raises InputError if timeout_s is no time limit, if the launcher has started more ranks than MPI
    sees, or if MPI is missing; CommunicationError if the ranks do not find each other.
    """
    check_timeout(timeout_s)
    if "comm" not in _CONNECTED:
        launcher = launcher_of(os.environ)
        if launcher.kind == "alone":
            _CONNECTED["comm"] = _alone()
        elif launcher.kind == "mpi":
            _CONNECTED["comm"] = _over_mpi(launcher, timeout_s, check)
        else:
            _CONNECTED["comm"] = _over_torch(timeout_s, check, backend)
    return _CONNECTED["comm"]


def _alone() -> Communicator:
    world = World(1)
    world.ranks[0].thread = threading.current_thread()
    return ThreadCommunicator(0, 1, world)


def _over_mpi(launcher: Launcher, timeout_s: float, check: bool) -> Communicator:
    from slimlab.comm.mpi_start import end_mpi, start_mpi

    # Nobody watches yet; if a rank does not come, the stacks of the others must do.
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    world = start_mpi(None).COMM_WORLD
    hosts = world.gather(socket.gethostname())
    keeper = _keep(world.size, timeout_s, hosts) if world.rank == 0 else None
    keeper, hosts = world.bcast((keeper, hosts))
    faulthandler.cancel_dump_traceback_later()
    _share_cores(hosts.count(hosts[world.rank]))

    def end() -> None:
        if "srun" in launcher.name:
            # srun lets the other ranks live when one ends, unless its site says otherwise.
            threading.Thread(target=world.Abort, args=(1,), daemon=True).start()
            time.sleep(1.0)
        os._exit(1)

    watch = _watch(keeper, world.rank, end)
    from slimlab.comm.mpi import world_communicator

    comm = world_communicator(check=check)
    look_after(comm, watch, end_mpi, end)
    return comm


def _over_torch(timeout_s: float, check: bool, backend: str | None) -> Communicator:
    from slimlab.comm.distributed import init_torch

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if backend is None:
        gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
        backend = "nccl" if gpus >= local_size else "gloo"
    check_choice("backend", backend, ("gloo", "nccl"))
    _share_cores(local_size)
    one_host = local_size == world_size
    if one_host:
        # gloo would look for the interface that the machine's name belongs to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = _store(rank, timeout_s)
    if rank == 0:
        hosts = [LOCALHOST] if one_host else [os.environ["MASTER_ADDR"], "others"]
        store.set("keeper", _keep(world_size, timeout_s, hosts))
    watch = _watch(store.get("keeper").decode(), rank, lambda: os._exit(1))
    # Later than the watch, which knows of all ranks and says more.
    late_s = 2 * timeout_s + LATER_S
    comm = init_torch(backend, rank, world_size, store, late_s, check, local_rank=local_rank)
    look_after(comm, watch, lambda: None, lambda: os._exit(1))
    return comm


def _store(rank: int, timeout_s: float) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun hosts the store itself, unless it is told not to.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=hosts,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        what = "could not listen at" if hosts else "did not reach the first rank at"
        raise CommunicationError(
            f"rank {rank} {what} {address}:{port}, as MASTER_ADDR and MASTER_PORT say\n{error}\n"
            "change: choose a port that no other program uses, and an address that all hosts reach"
        ) from error
    # Ranks that torchrun starts again must not find what the ones before have left.
    return dist.PrefixStore(f"slimlab{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _share_cores(local_size: int) -> None:
    """Let torch's threads of all ranks on this machine fit its cores, unless told otherwise."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return
    cores = len(os.sched_getaffinity(0))
    bound = cores < (os.cpu_count() or cores)
    torch.set_num_threads(max(1, cores if bound else cores // local_size))


def _keep(world_size: int, timeout_s: float, hosts: list[str]) -> str:
    """Start the keeper of all ranks, and say where it is."""
    here = LOCALHOST if len(set(hosts)) == 1 else _address(set(hosts[1:]) - {hosts[0]})
    if "others" in hosts:
        here = os.environ.get(HOST_VARIABLE, hosts[0])
    token = secrets.token_hex(16)
    port = start_keeper(world_size, timeout_s, token, LOCALHOST if here == LOCALHOST else "")
    return json.dumps([here, port, token])


def _address(others: Iterable[str]) -> str:
    """Return the address of this machine at which others can reach it."""
    if HOST_VARIABLE in os.environ:
        return os.environ[HOST_VARIABLE]
    # No packet is sent; the system only says by which of its addresses it would be. The last one
    # stands for the world outside, where a host's name is not known.
    for name in (*others, "192.0.2.1"):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((name, 9))
            return probe.getsockname()[0]
    return socket.gethostname()


def _watch(keeper: str, rank: int, end: Callable[[], None]) -> Watch | None:
    host, port, token = json.loads(keeper)
    try:
        sock = socket.create_connection((host, port), REACH_S)
    except OSError as error:
        sys.stderr.write(
            f"rank {rank} cannot reach {host}:{port} ({error}): if a rank fails or waits for ever, "
            f"nobody will say which\nchange: {HOST_VARIABLE}=... names that address of the first "
            "host which all hosts reach\n"
        )
        return None
    sock.settimeout(None)
    return Watch(Channel(sock), rank, must_last=False, token=token, end=end)
