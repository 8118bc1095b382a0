import math

import torch

from slimlab.model.heads import split_heads


def head_contributions(layer, x, mask=None):
    E = layer.d_head
    query = split_heads(layer.q_proj(x), E)
    key = split_heads(layer.k_proj(x), E)
    value = split_heads(layer.v_proj(x), E)
    copies = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(copies, dim=1)
    value = value.repeat(1, copies, 1, 1)
    scores = query @ key.mT / math.sqrt(E)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    heads = torch.softmax(scores, dim=-1) @ value
    parts = []
    for i in range(heads.shape[1]):
        block = layer.out_proj.weight[:, i * E : (i + 1) * E]
        parts.append(heads[:, i] @ block.T)
    contributions = torch.stack(parts, dim=1)
    bias = layer.out_proj.bias
    rest = torch.zeros(contributions.shape[-1], dtype=x.dtype) if bias is None else bias
    return contributions, rest
