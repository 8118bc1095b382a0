import torch


def short_all_to_all(comm, tensor):
    """What comm.all_to_all(tensor) returns, in log2 w messages from each rank."""
    w, rank = comm.world_size, comm.rank
    parts = tensor.chunk(w)
    travelling = [parts[(rank - d) % w] for d in range(w)]  # place d: has to go d ranks to the left
    distance = 1
    while 2 * distance < w:
        distance *= 2
    while distance >= 1 and w > 1:
        places = [d for d in range(w) if d & distance]
        leaving = torch.stack([travelling[d] for d in places])
        arrived = comm.sendrecv(leaving, (rank - distance) % w, (rank + distance) % w)
        for d, part in zip(places, arrived):
            travelling[d] = part
        distance //= 2
    return torch.cat([travelling[(src - rank) % w] for src in range(w)])
