import math

import torch

from slimlab.classroom.check import numbers


def my_prediction():
    """The probability of yes by both means."""
    given = numbers("13.1")  # by hand: at temperature 2 odds of 81 are odds of 9
    first, second = (one ** (1 / given["temperature"]) for one in given["odds"])
    both = math.sqrt(first * second)  # the mean of logits is that of the logarithms of odds
    probabilities = (first / (1 + first) + second / (1 + second)) / 2
    return {"probabilities": probabilities, "logits": both / (1 + both)}


def mixed_target(teachers, shares, temperature, mean):
    """The logarithms of the mean's probabilities (N, V)."""
    total = None
    for share, logits in zip(shares, teachers):
        if mean == "logits":
            own = share * logits / temperature
            total = own if total is None else total + own
        else:
            own = math.log(share) + (logits / temperature).log_softmax(-1)
            total = own if total is None else torch.logaddexp(total, own)
    return total.log_softmax(-1)


def excess(teachers, shares, temperature, mean):
    """What the mean over teachers of the loss is more than the loss of the mean, (N,)."""
    mixed, log_mean, entropies = None, 0.0, 0.0
    for share, logits in zip(shares, teachers):
        log_p = (logits / temperature).log_softmax(-1)
        own = math.log(share) + log_p
        mixed = own if mixed is None else torch.logaddexp(mixed, own)
        log_mean = log_mean + share * log_p
        entropies = entropies - share * (log_p.exp() * log_p).sum(-1)
    if mean == "logits":
        return log_mean.logsumexp(-1)  # 0 if all agree: then these are probabilities
    return -(mixed.exp() * mixed).sum(-1) - entropies
