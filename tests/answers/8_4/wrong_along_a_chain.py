import torch


def merged_top_k(comm, gradient, residual, k):
    """The sum of all ranks' largest numbers, k of them, and what is left for the next time."""
    waiting = gradient + residual  # what has not left this rank
    places = waiting.abs().topk(k).indices
    held = torch.zeros_like(waiting)
    held[places], waiting[places] = waiting[places], 0.0
    if comm.rank + 1 < comm.world_size:
        pairs = comm.recv(comm.rank + 1)
        held[pairs[1].long()] += pairs[0]
        places = held.abs().topk(k).indices
        fallen = held.clone()
        fallen[places] = 0.0
        waiting += fallen
        held -= fallen
    distance = 1
    pairs = torch.stack([held[places], places.double()])
    if comm.rank > 0:
        comm.send(pairs, comm.rank - distance)
    if comm.rank > 0:
        pairs = comm.recv(comm.rank - 1)
    if comm.rank + 1 < comm.world_size:
        comm.send(pairs, comm.rank + 1)
    update = torch.zeros_like(gradient)
    update[pairs[1].long()] = pairs[0]
    return update, waiting
