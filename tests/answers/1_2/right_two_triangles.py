import torch


def window_mask(T, S, width):
    assert_ok = width > 0 and S >= T
    if not assert_ok:
        raise ValueError("no such window")
    everything = torch.ones(T, S)
    return (everything.tril(S - T) * everything.triu(S - T - width + 1)) == 1


def window_pairs(T, width):
    full = max(0, T - width)
    grown = min(T, width)
    return full * width + grown * (grown + 1) // 2
