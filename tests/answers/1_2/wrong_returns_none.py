import torch


def window_pairs(T, width):
    width = min(width, T)
    return T * width - width * (width - 1) // 2


def window_mask(T, S, width):
    if width >= 1 and S >= T:
        d = torch.arange(S - T, S)[:, None] - torch.arange(S)
        return (d >= 0) & (d < width)
