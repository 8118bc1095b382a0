import torch


def running_sum(comm, tensor, distance=1):
    if distance >= comm.world_size:
        return torch.empty_like(tensor).copy_(tensor)
    right, left = comm.rank + distance, comm.rank - distance
    if right >= comm.world_size and left < 0:
        total = tensor
    elif right >= comm.world_size:
        total = tensor + comm.recv(left)
    elif left < 0:
        comm.send(tensor, right)
        total = tensor
    else:
        total = tensor + comm.sendrecv(tensor, right, left)
    return running_sum(comm, total, 2 * distance)
