import torch


def window_mask(T, S, width):
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    return (distance >= 0) & (distance < width)


def window_pairs(T, width):
    width = min(T, width)
    return T * width - width * (width - 1) // 2

