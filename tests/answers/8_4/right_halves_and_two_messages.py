import torch


def merged_top_k(comm, gradient, residual, k):
    total = gradient + residual
    rest = total.clone()
    values, places = choose(total, k)
    rest[places] -= values
    ranks = list(range(comm.world_size))
    merges = []
    while len(ranks) > 1:  # the second half goes to the first, rank by rank
        half = (len(ranks) + 1) // 2
        merges.append(dict(zip(ranks[half:], ranks)))
        ranks = ranks[:half]
    for pairs in merges:
        if comm.rank in pairs:
            comm.send(values, pairs[comm.rank])
            comm.send(places, pairs[comm.rank])
        for src, dst in pairs.items():
            if comm.rank == dst:
                merged = torch.zeros_like(rest)
                merged.index_add_(0, places, values)
                other = comm.recv(src)
                merged.index_add_(0, comm.recv(src), other)
                values, places = choose(merged, k)
                rest += merged
                rest[places] -= values
    values, places = comm.broadcast(values, 0), comm.broadcast(places, 0)
    return torch.zeros_like(rest).index_copy(0, places, values), rest


def choose(numbers, k):
    places = numbers.abs().argsort(descending=True)[:k]
    return numbers[places], places
