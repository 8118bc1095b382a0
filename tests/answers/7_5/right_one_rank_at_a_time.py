import torch

from slimlab.classroom.check import numbers
from slimlab.comm.launch import run_ranks


def predicted_weights():
    w = numbers("7.5")["world_size"]

    def share(first, size):  # of the ranks from first on, in a block of this size
        if size == 1:
            return [1.0]
        half = size // 2
        if first + half >= w:
            return share(first, half)
        return [one / 2 for one in share(first, half) + share(first + half, half)]

    return share(0, 16)


def weights(program, world_size):
    found = torch.zeros(world_size, world_size, dtype=torch.float64)
    for source in range(world_size):

        def only_source(comm):
            own = torch.tensor(float(comm.rank == source), dtype=torch.float64)  # noqa: B023
            return program(comm, own).item()

        found[:, source] = torch.tensor(run_ranks(only_source, world_size), dtype=torch.float64)
    return found


def is_right_for(world_size):
    while world_size % 2 == 0:
        world_size //= 2
    return world_size == 1


def mended_mean(comm, tensor):
    w, rank = comm.world_size, comm.rank
    total, distance = tensor / w, 1  # each brings its share
    while distance < w and rank % distance == 0 and not rank & distance:
        if rank + distance < w:
            total = total + comm.recv(rank + distance)
        distance *= 2
    if rank > 0:
        parent = rank - (rank & -rank)
        comm.send(total, parent)
        total = comm.recv(parent)
    while distance > 1:
        distance //= 2
        if rank + distance < w:
            comm.send(total, rank + distance)
    return total
