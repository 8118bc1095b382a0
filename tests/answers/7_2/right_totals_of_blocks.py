def running_sum(comm, tensor):
    mine, block = tensor.clone(), tensor.clone()  # my sum, and that of all ranks in my block
    bit = 1
    while bit < comm.world_size:
        partner = comm.rank ^ bit
        if partner < comm.world_size:
            other = comm.sendrecv(block, partner, partner)
            if partner < comm.rank:
                mine = mine + other
            block = block + other
        bit *= 2
    return mine
