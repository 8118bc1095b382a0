import torch


def short_all_to_all(comm, tensor):
    """What comm.all_to_all(tensor) returns, in log2 w messages from each rank."""
    w, rank = comm.world_size, comm.rank
    parts = tensor.chunk(w)
    travelling = [parts[(rank + d) % w] for d in range(w)]  # place d: has to go d ranks further
    distance = 1
    while distance < w:
        places = [d for d in range(w) if d & distance]
        leaving = torch.stack([travelling[d] for d in places])
        comm.send(leaving, (rank + distance) % w)
        arrived = comm.recv((rank - distance) % w)
        for d, part in zip(places, arrived):
            travelling[d] = part
        distance *= 2
    return torch.cat([travelling[(rank - src) % w] for src in range(w)])  # d = rank - src
