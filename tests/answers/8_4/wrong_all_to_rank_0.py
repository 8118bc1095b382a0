import torch


def merged_top_k(comm, gradient, residual, k):
    """The sum of all ranks' largest numbers, k of them, and what is left for the next time."""
    waiting = gradient + residual  # what has not left this rank
    places = waiting.abs().topk(k).indices
    held = torch.zeros_like(waiting)
    held[places], waiting[places] = waiting[places], 0.0
    if comm.rank > 0:
        comm.send(torch.stack([held[places], places.double()]), 0)
    for src in range(1, comm.world_size if comm.rank == 0 else 1):
        pairs = comm.recv(src)
        held[pairs[1].long()] += pairs[0]
    places = held.abs().topk(k).indices
    if comm.rank == 0:
        fallen = held.clone()
        fallen[places] = 0.0
        waiting += fallen
        held -= fallen
    pairs = torch.stack([held[places], places.double()])
    pairs = comm.broadcast(pairs, 0)
    update = torch.zeros_like(gradient)
    update[pairs[1].long()] = pairs[0]
    return update, waiting
