import math

import torch

from slimlab.classroom.check import numbers
from slimlab.comm.launch import run_ranks


def step(comm, weights, rows, targets, max_norm):
    """Mean loss of all ranks' rows, and its gradient, which is clipped to max_norm."""
    errors = rows @ weights - targets
    own = rows.T @ errors / max(len(rows), 1)  # of the mean over this rank's rows
    own = own * (max_norm / own.norm()).clamp(max=1.0)  # one wild rank must not throw off all
    loss_and_count = torch.tensor([errors.square().sum() / 2, len(rows)], dtype=own.dtype)
    flat = comm.all_reduce(torch.cat([own * len(rows), loss_and_count]))
    return flat[-2] / flat[-1], flat[:-2] / flat[-1]


def my_diagnosis():
    """What step returns, what it should return, and where it goes wrong."""
    given = numbers("8.2")

    def clip(vector):
        return [one * min(1.0, given["max_norm"] / math.hypot(*vector)) for one in vector]

    def mean(vectors):
        (a, b), n = given["counts"], sum(given["counts"])
        return [(a * first + b * second) / n for first, second in zip(*vectors)]

    found = mean([clip(vector) for vector in given["gradients"]])
    return {"found": found, "true": clip(mean(given["gradients"])), "where": 3}


def is_right(step):
    """Whether step does what one process does, on every rank."""
    weights = torch.ones(3, dtype=torch.float64)

    def on_rank(comm, parts, max_norm):
        return step(comm, weights.clone(), *parts[comm.rank], max_norm)

    for counts in ([5], [3, 3], [6, 2], [4, 0, 1], [1, 2, 3, 6]):
        generator = torch.Generator().manual_seed(len(counts))
        x = torch.randn(sum(counts), 3, generator=generator, dtype=torch.float64)
        y = x.sum(dim=1) ** 2
        parts = list(zip(x.split(counts), y.split(counts)))
        gradient = x.T @ (x @ weights - y) / len(x)
        for max_norm in (0.3 * gradient.norm().item(), 2 * gradient.norm().item()):
            true = gradient * min(1.0, max_norm / gradient.norm().item())
            for own_loss, own in run_ranks(on_rank, len(counts), args=(parts, max_norm)):
                near = own_loss > 0 and torch.allclose(own, true)
                if not near:
                    return False
    return True


def mended_step(comm, weights, rows, targets, max_norm):
    """step, with the gradient of one process."""
    errors = rows @ weights - targets
    loss_and_count = torch.tensor([errors.square().sum() / 2, len(rows)], dtype=rows.dtype)
    flat = comm.all_reduce(torch.cat([rows.T @ errors, loss_and_count]))
    gradient = flat[:-2] / flat[-1]  # of all ranks: what is clipped
    gradient = gradient * (max_norm / gradient.norm()).clamp(max=1.0)
    return flat[-2] / flat[-1], gradient
