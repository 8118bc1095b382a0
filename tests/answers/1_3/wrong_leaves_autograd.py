import numpy as np
import torch


def attend_or_abstain(scores):
    s = scores.detach().numpy()
    m = np.maximum(s.max(-1, keepdims=True), 0)
    p = np.exp(s - m)
    return torch.from_numpy(p / (np.exp(-m) + p.sum(-1, keepdims=True)))
