import torch

from slimlab.train.update_rules import adamw_update


def begin(comm, weights):
    """What this rank keeps: master and averages of its own part."""
    size, longer = divmod(len(weights), comm.world_size)
    sizes = [size + (rank < longer) for rank in range(comm.world_size)]
    first = sum(sizes[: comm.rank])
    master = weights[first : first + sizes[comm.rank]].double()  # a copy, not a view
    averages = [torch.zeros_like(master), torch.zeros_like(master)]
    return {"sizes": sizes, "master": master, "averages": averages, "step": 0}


def zero_step(comm, state, gradient_sum, num_tokens, max_norm, **settings):
    """One AdamW step on all ranks' gradients; returns all new weights."""
    own_sum = comm.reduce_scatter(gradient_sum, sizes=state["sizes"]).double()
    own_numbers = torch.stack([own_sum.square().sum(), torch.tensor(num_tokens).double()])
    squares, num_tokens_of_all = comm.all_reduce(own_numbers)
    norm = squares.sqrt() / num_tokens_of_all  # of the mean, over all parts
    gradient = own_sum / num_tokens_of_all * (max_norm / norm).clamp(max=1.0)
    state["step"] += 1
    adamw_update(state["master"], gradient, *state["averages"], state["step"], **settings)
    new = comm.all_gather(state["master"].float(), sizes=state["sizes"])
    state["new"] = new
    return new
