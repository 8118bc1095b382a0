import torch


def merged_top_k(comm, gradient, residual, k):
    """The sum of all ranks' largest numbers, k of them, and what is left for the next time."""
    waiting = gradient + residual  # what has not left this rank
    places = waiting.topk(k).indices
    held = torch.zeros_like(waiting)
    held[places], waiting[places] = waiting[places], 0.0
    distance = 1
    while distance < comm.world_size and comm.rank % (2 * distance) == 0:
        if comm.rank + distance < comm.world_size:
            pairs = comm.recv(comm.rank + distance)
            held[pairs[1].long()] += pairs[0]
            places = held.topk(k).indices
            fallen = held.clone()
            fallen[places] = 0.0
            waiting += fallen
            held -= fallen
        distance *= 2
    pairs = torch.stack([held[places], places.double()])
    if comm.rank > 0:
        comm.send(pairs, comm.rank - distance)
    pairs = comm.broadcast(pairs, 0)
    update = torch.zeros_like(gradient)
    update[pairs[1].long()] = pairs[0]
    return update, waiting
