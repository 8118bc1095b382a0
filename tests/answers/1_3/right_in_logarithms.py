import torch


def attend_or_abstain(scores):
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), scores.new_zeros(1))
    return torch.exp(scores - total)
