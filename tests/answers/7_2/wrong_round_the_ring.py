def running_sum(comm, tensor):
    """The sum of the tensors of ranks 0 to comm.rank."""
    total = tensor.clone()
    distance, w = 1, comm.world_size
    while distance < w:
        right, left = (comm.rank + distance) % w, (comm.rank - distance) % w
        total = total + comm.sendrecv(total, right, left)
        distance *= 2
    return total
