import torch

from slimlab.classroom.check import numbers


def predicted_starts():
    given = numbers("8.5")
    n, m = given["num_tokens"], given["momentum"]
    d = [(n[0] * a + n[1] * b) / sum(n) for a, b in given["moves"]]  # mean moves
    first = given["start"] + given["lr"] * (1 + m) * d[0]
    return [first, first + given["lr"] * ((1 + m) * d[1] + m * m * d[0])]


def outer_step(comm, start, weights, num_tokens, state, lr, momentum):
    packed = torch.zeros(len(start) + 1, dtype=torch.float64)
    packed[0] = num_tokens
    packed[1:] = weights * num_tokens
    packed = comm.all_reduce(packed)
    change = packed[1:] / packed[0] - start
    if "ahead" not in state:
        state["ahead"] = torch.zeros_like(start)
    state["ahead"].mul_(momentum).add_(change)
    return torch.add(start, change + momentum * state["ahead"], alpha=lr)


def largest_outer_lr(rho, momentum):
    low, high = 0.0, 4.0 / (1 - rho)
    while high - low > 1e-9:
        lr = (low + high) / 2
        matrix = torch.tensor(
            [[1 - lr * (1 - rho) * (1 + momentum), -lr * momentum**2], [1 - rho, momentum]]
        ).double()
        rests = torch.linalg.eigvals(matrix).abs().max() < 1
        low, high = (lr, high) if rests else (low, lr)
    return high
