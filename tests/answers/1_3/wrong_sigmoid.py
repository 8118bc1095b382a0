import torch


def attend_or_abstain(scores):
    return torch.sigmoid(scores)
