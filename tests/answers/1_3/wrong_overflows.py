import torch


def attend_or_abstain(scores):
    powers = torch.exp(scores)
    return powers / (1 + powers.sum(-1, keepdim=True))
