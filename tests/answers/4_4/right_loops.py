import torch

from slimlab.train.objectives import IGNORE


def prefix_mask(prefix_lens, T):
    mask = torch.zeros(len(prefix_lens), 1, T, T, dtype=torch.bool)
    for row, length in enumerate(prefix_lens.tolist()):
        mask[row, 0, :, :length] = True
        for query in range(T):
            mask[row, 0, query, : query + 1] = True
    return mask


def prefix_targets(ids, prefix_lens):
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    for row, length in enumerate(prefix_lens.tolist()):
        targets[row, : max(length - 1, 0)] = IGNORE
    return targets


def peeks(mask, targets):
    above = torch.diagonal(mask.squeeze(1), offset=1, dim1=-2, dim2=-1)
    return (above & targets[:, :-1].ne(IGNORE)).sum().item()
