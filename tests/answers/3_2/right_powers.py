import torch


def leaking_places(mask, num_layers):
    T = len(mask)
    step = (mask | torch.eye(T, dtype=torch.bool)).double()
    reach = torch.linalg.matrix_power(step, num_layers) > 0.5
    return torch.cat([reach.diagonal(1), torch.zeros(1, dtype=torch.bool)])


def first_leaking_depth(mask):
    depths = [n for n in range(1, len(mask) + 1) if bool(leaking_places(mask, n).any())]
    return min(depths, default=None)
