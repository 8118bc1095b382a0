import torch


def window_mask(T, S, width):
    if width < 1 or S < T:
        raise ValueError("no")
    d = torch.arange(S - T, S)[:, None] - torch.arange(S)
    return (d >= 0) & (d < width)


def window_pairs(T, width):
    return T * width - width * (width - 1) // 2
