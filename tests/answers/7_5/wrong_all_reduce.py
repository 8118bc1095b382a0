import torch

from slimlab.classroom.check import numbers
from slimlab.comm.launch import run_ranks


def predicted_weights():
    """The weight of each rank in the result of tree_mean, rank 0 first."""
    w = numbers("7.5")["world_size"]  # by hand: halve at each meeting, for all who met so far
    held = {rank: {rank: 1.0} for rank in range(w)}
    distance = 1
    while distance < w:
        for rank in range(0, w - distance, 2 * distance):
            both = held[rank] | held[rank + distance]
            held[rank] = {one: weight / 2 for one, weight in both.items()}
        distance *= 2
    return [held[0][rank] for rank in range(w)]


def weights(program, world_size):
    """(w, w): row r, column s is the weight of rank s's tensor in rank r's result."""
    brought = torch.eye(world_size, dtype=torch.float64)
    results = run_ranks(lambda comm: program(comm, brought[comm.rank].clone()), world_size)
    return torch.stack(list(results))


def is_right_for(world_size):
    """Whether tree_mean is right on so many ranks."""
    return world_size & (world_size - 1) == 0  # a power of two: equal numbers always meet


def mended_mean(comm, tensor):
    """The mean over all ranks, on every rank."""
    return comm.all_reduce(tensor, op="mean")
