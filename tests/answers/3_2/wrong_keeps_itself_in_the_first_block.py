import torch


def leaking_places(mask, num_layers):
    T = len(mask)
    known = mask | torch.eye(T).bool()
    for _ in range(num_layers - 1):
        known = mask.float() @ known.float() > 0
    leaks = torch.zeros(T).bool()
    leaks[:-1] = known.diagonal(1)
    return leaks


def first_leaking_depth(mask):
    for num_layers in range(1, len(mask) + 1):
        if leaking_places(mask, num_layers).any():
            return num_layers
