import torch


def attend_or_abstain(scores):
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=0.0)
    powers = torch.exp(scores - largest)
    return powers / (torch.exp(-largest) + powers.sum(-1, keepdim=True))
