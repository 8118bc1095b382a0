import torch


def window_mask(T, S, width):
    if width < 1 or T > S:
        raise ValueError("x")
    m = torch.zeros(T, S, dtype=torch.bool)
    for t in range(T):
        end = S - T + t + 1
        m[t, max(0, end - width) : end] = True
    return m


def window_pairs(T, width):
    return torch.arange(1, T + 1).clamp(max=width).sum()
