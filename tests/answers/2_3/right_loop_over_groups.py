import torch
from torch import nn

from slimlab.config import InputError
from slimlab.model.attention import MultiHeadAttention


def averaged(linear, d_head, num_groups):
    heads = list(linear.weight.detach().clone().split(d_head))
    size = len(heads) // num_groups
    groups = [heads[g * size : (g + 1) * size] for g in range(num_groups)]
    new = nn.Linear(linear.in_features, num_groups * d_head, linear.bias is not None)
    new.weight = nn.Parameter(torch.cat([sum(group) / size for group in groups]))
    if linear.bias is not None:
        parts = list(linear.bias.detach().clone().split(d_head))
        groups = [parts[g * size : (g + 1) * size] for g in range(num_groups)]
        new.bias = nn.Parameter(torch.cat([sum(group) / size for group in groups]))
    return new


def group_heads(layer, num_kv_heads):
    old = layer.k_proj.out_features // layer.d_head
    if old % num_kv_heads:
        raise InputError("groups of one size", f"{old} heads, {num_kv_heads} groups", "another K")
    num_heads = layer.q_proj.out_features // layer.d_head
    bias = layer.q_proj.bias is not None
    new = MultiHeadAttention(
        layer.q_proj.in_features, num_heads, num_kv_heads, layer.d_head, bias=bias
    ).to(layer.q_proj.weight)
    new.q_proj.load_state_dict(layer.q_proj.state_dict())
    new.out_proj.load_state_dict(layer.out_proj.state_dict())
    new.k_proj = averaged(layer.k_proj, layer.d_head, num_kv_heads)
    new.v_proj = averaged(layer.v_proj, layer.d_head, num_kv_heads)
    return new
