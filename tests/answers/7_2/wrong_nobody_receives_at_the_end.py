def running_sum(comm, tensor):
    """The sum of the tensors of ranks 0 to comm.rank."""
    total = tensor.clone()
    distance = 1
    while distance < comm.world_size:
        right, left = comm.rank + distance, comm.rank - distance
        handle = comm.isend(total, right % comm.world_size)
        arrived = comm.recv(left) if left >= 0 else None
        if handle is not None:
            handle.wait()
        if arrived is not None:
            total = arrived + total  # now the sum of the last 2 * distance ranks up to this one
        distance *= 2
    return total
