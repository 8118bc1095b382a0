import torch


def attend_or_abstain(scores):
    powers = torch.exp(scores.clamp(-50, 50))
    return powers / (1 + powers.sum(-1, keepdim=True))
