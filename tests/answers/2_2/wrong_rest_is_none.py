import math

import torch

from slimlab.model.heads import repeat_heads, split_heads


def head_contributions(layer, x, mask=None):
    query = split_heads(layer.q_proj(x), layer.d_head)
    key = repeat_heads(split_heads(layer.k_proj(x), layer.d_head), query)
    value = repeat_heads(split_heads(layer.v_proj(x), layer.d_head), query)
    scores = query @ key.mT / math.sqrt(layer.d_head)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    heads = torch.softmax(scores, dim=-1) @ value
    blocks = layer.out_proj.weight.unflatten(1, (-1, layer.d_head))
    contributions = torch.einsum("bhte,dhe->bhtd", heads, blocks)
    return contributions, layer.out_proj.bias
