import math
import torch


def attend_or_abstain(scores):
    flat = scores.reshape(-1, scores.shape[-1])
    rows = []
    for row in flat:
        top = max(0.0, row.max().item())
        d = math.exp(-top)
        for x in row:
            d = d + torch.exp(x - top)
        rows.append(torch.stack([torch.exp(x - top) / d for x in row]))
    return torch.stack(rows).reshape(scores.shape)
