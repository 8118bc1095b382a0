import torch
from torch import nn


def group_heads(layer, num_kv_heads):
    K = layer.k_proj.out_features // layer.d_head
    if K % num_kv_heads:
        raise ValueError("unequal groups")
    for linear in (layer.k_proj, layer.v_proj):
        for name, p in list(linear.named_parameters()):
            groups = p.detach().unflatten(0, (num_kv_heads, -1, layer.d_head))
            setattr(linear, name, nn.Parameter(groups.mean(1).flatten(0, 1)))
        linear.out_features = num_kv_heads * layer.d_head
    return layer
