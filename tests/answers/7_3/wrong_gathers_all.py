def short_all_to_all(comm, tensor):
    w, rows = comm.world_size, len(tensor) // comm.world_size
    everything = comm.all_gather(tensor).reshape(w, w, rows, *tensor.shape[1:])
    return everything[:, comm.rank].reshape(tensor.shape)
