import copy

from torch import nn


def group_heads(layer, num_kv_heads):
    old = layer.k_proj.out_features // layer.d_head
    if old % num_kv_heads:
        raise ValueError("groups of unequal size")
    weights = copy.deepcopy(layer.state_dict())
    for name, weight in weights.items():
        if name.startswith(("k_proj", "v_proj")):
            groups = weight.unflatten(0, (num_kv_heads, -1, layer.d_head))
            weights[name] = groups.mean(dim=1).flatten(0, 1)
    new = copy.deepcopy(layer)
    for name in ("k_proj", "v_proj"):
        weight = nn.Parameter(weights[f"{name}.weight"])
        getattr(new, name).weight = weight
