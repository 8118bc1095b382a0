import torch


def leaking_places(mask, num_layers):
    T = mask.shape[0]
    step = mask | torch.eye(T, dtype=torch.bool)
    known = torch.eye(T, dtype=torch.bool)
    for _ in range(num_layers):
        known = (step[:, :, None] & known[None]).any(dim=1)
    leaks = torch.zeros(T, dtype=torch.bool)
    for t in range(T - 1):
        leaks[t] = known[t + 1, t]
    return leaks


def first_leaking_depth(mask):
    for num_layers in range(1, mask.shape[0] + 1):
        if leaking_places(mask, num_layers).any():
            return num_layers
    return None
