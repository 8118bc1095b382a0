import torch


def attend_or_abstain(scores):
    zero = torch.zeros_like(scores[..., :1])
    weights = torch.cat([scores, zero], dim=-1).softmax(dim=-1)[..., :-1]
    return weights / weights.sum(-1, keepdim=True)
