import torch


def attend_or_abstain(scores):
    largest = scores.amax(-1, keepdim=True)
    powers = torch.exp(scores - largest)
    return powers / (torch.exp(-largest) + powers.sum(-1, keepdim=True))
