import torch


def merged_top_k(comm, gradient, residual, k):
    rest = gradient + residual
    mine = dict(_largest({i: one for i, one in enumerate(rest.tolist())}, k))
    rest[list(mine)] = 0.0
    w, rank = comm.world_size, comm.rank
    level = 0
    while rank % 2 ** (level + 1) == 0 and 2**level < w:
        other = rank + 2**level
        level += 1
        if other >= w:
            continue
        places, values = comm.recv(other), comm.recv(other)
        for place, value in zip(places.tolist(), values.tolist()):
            mine[place] = mine.get(place, 0.0) + value
        stay = dict(_largest(mine, k))
        for place in set(mine) - set(stay):
            rest[place] += mine[place]
        mine = stay
    if rank:
        _send(comm, mine, rank - 2**level)
        below = rank - 2**level
        places, values = comm.recv(below), comm.recv(below)
        mine = dict(zip(places.tolist(), values.tolist()))
    while level > 0:
        level -= 1
        if rank + 2**level < w:
            _send(comm, mine, rank + 2**level)
    update = torch.zeros_like(rest)
    for place, value in mine.items():
        update[place] = value
    return update, rest


def _largest(pairs, k):
    return sorted(pairs.items(), key=lambda pair: -abs(pair[1]))[:k]


def _send(comm, pairs, dst):
    comm.send(torch.tensor(list(pairs), dtype=torch.int64), dst)
    comm.send(torch.tensor(list(pairs.values()), dtype=torch.float64), dst)
