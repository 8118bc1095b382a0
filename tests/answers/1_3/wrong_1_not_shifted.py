import torch


def attend_or_abstain(scores):
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / (1 + powers.sum(-1, keepdim=True))
