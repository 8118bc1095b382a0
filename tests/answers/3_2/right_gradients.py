import torch


def leaking_places(mask, num_layers):
    T = mask.shape[0]
    x = torch.ones(T, T, dtype=torch.float64).mul(torch.eye(T, dtype=torch.float64))
    for _ in range(num_layers):
        x = x + mask.double() @ x
    return torch.stack([x[t, t + 1] > 0 if t + 1 < T else torch.tensor(False) for t in range(T)])


def first_leaking_depth(mask):
    depth = 1
    while depth <= mask.shape[0]:
        if leaking_places(mask, depth).any():
            return depth
        depth += 1
