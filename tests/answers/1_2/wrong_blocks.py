import torch


def window_pairs(T, width):
    width = min(width, T)
    return T * width - width * (width - 1) // 2


def window_mask(T, S, width):
    if width < 1 or S < T:
        raise ValueError("no")
    t, s = (torch.arange(S - T, S)[:, None], torch.arange(S))
    return (t // width == s // width) & (s <= t)
