import numpy as np


def window_pairs(T, width):
    width = min(width, T)
    return T * width - width * (width - 1) // 2


def window_mask(T, S, width):
    if width < 1 or S < T:
        raise ValueError("no")
    return np.tril(np.ones((T, S), bool), S - T) & np.triu(np.ones((T, S), bool), S - T - width + 1)
