import torch


def window_mask(T, S, width):
    if width < 1 or S < T:
        raise ValueError((T, S, width))
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    return (distance >= 0) & (distance < width)


def window_pairs(T, width):
    return T * min(T, width)

