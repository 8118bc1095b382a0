import math

import torch


def begin(comm, weights):
    part = math.ceil(len(weights) / comm.world_size)
    mine = torch.zeros(3, part, dtype=torch.float64)  # weights and both averages
    own = weights[comm.rank * part : (comm.rank + 1) * part]
    mine[0, : len(own)] = own
    return {"mine": mine, "length": len(weights), "steps": []}


def zero_step(comm, state, gradient_sum, num_tokens, max_norm, **settings):
    part = state["mine"].shape[1]
    filled = torch.nn.functional.pad(gradient_sum, (0, part * comm.world_size - state["length"]))
    gradient = comm.reduce_scatter(filled).double()
    told = torch.tensor([(gradient @ gradient).item(), num_tokens], dtype=torch.float64)
    square, tokens = comm.all_reduce(told).tolist()
    gradient = gradient / tokens
    length = math.sqrt(square) / tokens
    if length > max_norm:
        gradient = gradient * max_norm / length
    state["steps"].append(max_norm)
    step = len(state["steps"])
    state["mine"][0] *= 1 - settings["lr"] * settings["weight_decay"]
    beta1, beta2 = settings["betas"]
    state["mine"][1] += (1 - beta1) * (gradient - state["mine"][1])
    state["mine"][2] += (1 - beta2) * (gradient.square() - state["mine"][2])
    root = (state["mine"][2] / (1 - beta2**step)).sqrt() + settings["eps"]
    state["mine"][0] -= settings["lr"] * state["mine"][1] / (1 - beta1**step) / root
    return comm.all_gather(state["mine"][0].float())[: state["length"]]
