import torch


def attend_or_abstain(scores):
    one = torch.ones_like(scores[..., :1])
    return torch.cat([scores, one], dim=-1).softmax(dim=-1)[..., :-1]
