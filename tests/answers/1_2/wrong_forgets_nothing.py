import torch


def window_mask(T, S, width):
    if width < 1 or S < T:
        raise ValueError((T, S, width))
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def window_pairs(T, width):
    width = min(T, width)
    return T * width - width * (width - 1) // 2

