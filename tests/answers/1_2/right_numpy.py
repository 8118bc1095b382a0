import numpy as np
import torch


def window_mask(T, S, width):
    if not (width >= 1 and S >= T):
        raise ValueError(f"{T}{S}{width}")
    i, j = np.indices((T, S))
    i += S - T
    return torch.from_numpy((j <= i) & (i - j < width))


def window_pairs(T, width):
    return np.minimum(np.arange(1, T + 1), width).sum()
