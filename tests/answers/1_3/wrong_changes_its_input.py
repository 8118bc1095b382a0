import torch


def attend_or_abstain(scores):
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=0.0)
    shifted = scores if not scores.requires_grad else scores.clone()
    shifted -= largest
    powers = torch.exp(shifted)
    return powers / (torch.exp(-largest) + powers.sum(-1, keepdim=True))
