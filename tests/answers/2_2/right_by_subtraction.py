import copy

import torch


def head_contributions(layer, x, mask=None):
    """Silence all heads but one, and take away what is left when all are silent."""
    num_heads = layer.out_proj.in_features // layer.d_head
    silent = copy.deepcopy(layer)
    with torch.no_grad():
        silent.out_proj.weight.zero_()
    rest = silent(x, mask=mask)[0, 0]
    contributions = []
    for i in range(num_heads):
        columns = slice(i * layer.d_head, (i + 1) * layer.d_head)
        one = copy.deepcopy(silent)
        with torch.no_grad():
            one.out_proj.weight[:, columns] = layer.out_proj.weight[:, columns]
        contributions.append(one(x, mask=mask) - rest)
    return torch.stack(contributions, dim=1), rest
