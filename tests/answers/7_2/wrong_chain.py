def running_sum(comm, tensor):
    total = tensor.clone()
    if comm.rank > 0:
        total = comm.recv(comm.rank - 1) + total
    if comm.rank + 1 < comm.world_size:
        comm.send(total, comm.rank + 1)
    return total
