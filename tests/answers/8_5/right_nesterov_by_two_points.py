import math

import torch

from slimlab.classroom.check import numbers


def predicted_starts():
    given = numbers("8.5")
    lr, momentum = given["lr"], given["momentum"]
    share = given["num_tokens"][0] / sum(given["num_tokens"])
    start, velocity, found = float(given["start"]), 0.0, []
    for first, second in given["moves"]:
        move = share * first + (1 - share) * second
        velocity = momentum * velocity + move
        start += lr * move + lr * momentum * velocity
        found.append(start)
    return torch.tensor(found)


def outer_step(comm, start, weights, num_tokens, state, lr, momentum):
    """Nesterov's other form: a point that plain momentum reaches, and one ahead of it."""
    point = state.get("point", start)  # start is momentum times the last step ahead of it
    message = torch.cat([torch.full((1,), num_tokens).double(), num_tokens * (weights - start)])
    message = comm.all_reduce(message)
    new_point = start + lr * message[1:] / message[0]
    state["point"] = new_point
    return new_point + momentum * (new_point - point)


def largest_outer_lr(rho, momentum):
    if momentum == 0:
        return 2 / (1 - rho)
    return math.exp(math.log1p(momentum) - math.log1p(2 * momentum)) * 2 / (1 - rho)
