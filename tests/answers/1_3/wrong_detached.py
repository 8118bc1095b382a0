import torch


def attend_or_abstain(scores):
    largest = scores.amax(-1, keepdim=True).clamp(min=0.0)
    powers = torch.exp(scores - largest)
    total = torch.exp(-largest) + powers.sum(-1, keepdim=True)
    return powers / total.detach()
