import math

import torch

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("13.1")
    logits = [math.log(one) / given["temperature"] for one in given["odds"]]
    p = [1 / (1 + math.exp(-one)) for one in logits]
    return {"probabilities": sum(p) / 2, "logits": 1 / (1 + math.exp(-sum(logits) / 2))}


def mixed_target(teachers, shares, temperature, mean):
    total = None
    for share, logits in zip(shares, teachers):
        log_p = torch.log_softmax(logits / temperature, dim=-1)
        if mean == "probabilities":
            pair = log_p + math.log(share)
            total = pair if total is None else torch.stack((total, pair)).logsumexp(0)
        else:
            total = share * log_p + (0 if total is None else total)
    return total - total.logsumexp(-1, keepdim=True)


def excess(teachers, shares, temperature, mean):
    log_ps = [torch.log_softmax(logits / temperature, dim=-1) for logits in teachers]
    weights = torch.tensor(shares, dtype=torch.float64)[:, None, None]
    log_p = torch.stack(log_ps)
    if mean == "logits":
        return -(weights * log_p).sum(0).logsumexp(-1)
    mixed = (weights * log_p.exp()).sum(0)
    inner = torch.xlogy(mixed, mixed).sum(-1)
    return (weights[..., 0] * torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)).sum(0) - inner
