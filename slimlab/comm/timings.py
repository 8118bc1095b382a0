"""How long messages and additions take: loops that time them one by one.

slimlab.comm.calibrate fits lines to what they return, the demo ping_pong shows it. Production
benchmarks (OSU, nccl-tests) time many messages together, which hides how much one differs from the
next.
"""

from time import perf_counter

import torch

from slimlab.comm.base import Communicator


def round_trips_s(
    comm: Communicator, tensor: torch.Tensor, peer: int, trips: int
) -> tuple[list[float], torch.Tensor]:
    """Send a tensor to a partner and back, again and again.

    comm     a communicator
    tensor   of the same shape and dtype on both ranks
    peer     the other rank, which calls this too; the lower one of both begins
    trips    how often; one more comes before, which is not timed
    returns  half the seconds of each round trip as this rank saw them, and what arrived last

    Communicates: trips + 1 messages out and as many in.
    """
    seconds, arrived = [], torch.empty_like(tensor)
    for _ in range(trips + 1):
        begin_s = perf_counter()
        if comm.rank < peer:
            comm.send(tensor, peer)
            comm.recv(peer, out=arrived)
        else:
            comm.recv(peer, out=arrived)
            comm.send(arrived, peer)
        settle(comm)
        seconds.append((perf_counter() - begin_s) / 2)
    return seconds[1:], arrived


def exchanges_s(comm: Communicator, tensor: torch.Tensor, peer: int, trips: int) -> list[float]:
    """Send a tensor to a partner and receive one from it at the same time, again and again.

    comm     a communicator
    tensor   of the same shape and dtype on both ranks
    peer     the other rank, which calls this too
    trips    how often; one more comes before, which is not timed
    returns  the seconds of each exchange

    Communicates: trips + 1 messages out and as many in.
    """
    seconds, arrived = [], torch.empty_like(tensor)
    for _ in range(trips + 1):
        begin_s = perf_counter()
        comm.sendrecv(tensor, peer, peer, out=arrived)
        settle(comm)
        seconds.append(perf_counter() - begin_s)
    return seconds[1:]


def combine_s(comm: Communicator, n_bytes: int, trips: int) -> list[float]:
    """Time the addition of bytes that arrived to bytes that are there.

    comm     a communicator; all its ranks add at the same time
    n_bytes  of either, in float32
    trips    how often; one more comes before, which is not timed
    returns  the seconds of each addition

    Communicates: nothing.
    """
    there = torch.zeros(n_bytes // 4, device=comm.device)
    arrived = torch.ones_like(there)
    seconds = []
    for _ in range(trips + 1):
        begin_s = perf_counter()
        torch.add(there, arrived, out=there)
        settle(comm)
        seconds.append(perf_counter() - begin_s)
    return seconds[1:]


def settle(comm: Communicator) -> None:
    """Wait until this rank's GPU, if it has one, has done what it was told.

    comm  its communicator
    """
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)
