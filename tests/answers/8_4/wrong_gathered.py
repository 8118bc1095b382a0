import torch


def merged_top_k(comm, gradient, residual, k):
    """The sum of all ranks' largest numbers, k of them, and what is left for the next time."""
    waiting = gradient + residual  # what has not left this rank
    places = waiting.abs().topk(k).indices
    held = torch.zeros_like(waiting)
    held[places], waiting[places] = waiting[places], 0.0
    pairs = comm.all_gather(torch.stack([held[places], places.double()])[None])
    total = torch.zeros_like(gradient)
    for values, at in pairs:
        total[at.long()] += values
    places = total.abs().topk(k).indices
    update = torch.zeros_like(gradient)
    update[places] = total[places]
    if comm.rank == 0:
        waiting += total - update
    return update, waiting
