import copy

import torch

from slimlab.model.attention import MultiHeadAttention


def group_heads(layer, num_kv_heads):
    E = layer.d_head
    num_heads = layer.q_proj.out_features // E
    old_kv_heads = layer.k_proj.out_features // E
    if old_kv_heads % num_kv_heads != 0:
        raise ValueError("groups of unequal size")
    copies = old_kv_heads // num_kv_heads
    shrink = copies / num_heads
    has_bias = layer.q_proj.bias is not None
    new = MultiHeadAttention(layer.q_proj.in_features, num_heads, num_kv_heads, E, bias=has_bias)
    new = new.to(layer.q_proj.weight.dtype)
    with torch.no_grad():
        for name in ("q_proj", "out_proj"):
            getattr(new, name).load_state_dict(getattr(layer, name).state_dict())
        for name in ("k_proj", "v_proj"):
            old, made = getattr(layer, name), getattr(new, name)
            heads = old.weight.view(num_kv_heads, copies, E, -1)
            made.weight.copy_(heads.mean(dim=1).flatten(0, 1) * shrink)
            if has_bias:
                made.bias.copy_(old.bias.view(num_kv_heads, copies, E).mean(dim=1).flatten())
    return new
