def running_sum(comm, tensor):
    """The sum of the tensors of ranks 0 to comm.rank."""
    total = tensor.clone()
    distance = 1
    while distance < comm.world_size:
        right, left = comm.rank + distance, comm.rank - distance
        if left >= 0:
            total = total + comm.recv(left)
        if right < comm.world_size:
            comm.send(total, right)
        distance *= 2
    return total
