import torch

from slimlab.train.objectives import IGNORE


def prefix_mask(prefix_lens, T):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    key = torch.arange(T).view(1, 1, 1, T)
    return causal | (key < prefix_lens.view(-1, 1, 1, 1))


def prefix_targets(ids, prefix_lens):
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    place = torch.arange(ids.shape[1])
    return targets.masked_fill(place + 1 < prefix_lens[:, None], 0)


def peeks(mask, targets):
    count = 0
    B, T = targets.shape
    for row in range(B):
        for t in range(T - 1):
            count += bool(mask[row, 0, t, t + 1]) and int(targets[row, t]) != IGNORE
    return count
