import math

import torch
from torch import nn

from slimlab.model.heads import split_heads


def part(linear, rows=None, columns=None):
    weight, bias = linear.weight.detach().clone(), linear.bias
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias.detach().clone()[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = nn.Parameter(weight)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new


class Smaller(nn.Module):
    def __init__(self, layer, kept):
        super().__init__()
        self.d_head = E = layer.d_head
        group = layer.q_proj.out_features // layer.k_proj.out_features
        kept_kv = sorted({i // group for i in kept})
        self.use = [kept_kv.index(i // group) for i in kept]
        rows = [i * E + e for i in kept for e in range(E)]
        kv_rows = [k * E + e for k in kept_kv for e in range(E)]
        self.q_proj = part(layer.q_proj, rows)
        self.k_proj = part(layer.k_proj, kv_rows)
        self.v_proj = part(layer.v_proj, kv_rows)
        self.out_proj = part(layer.out_proj, columns=rows)

    def forward(self, x, mask=None):
        query = split_heads(self.q_proj(x), self.d_head)
        key = split_heads(self.k_proj(x), self.d_head)[:, self.use]
        value = split_heads(self.v_proj(x), self.d_head)[:, self.use]
        scores = query @ key.mT / math.sqrt(self.d_head)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        heads = torch.softmax(scores, dim=-1) @ value
        return self.out_proj(heads.transpose(1, 2).flatten(2))


def remove_heads(layer, removed):
    num_heads = layer.q_proj.out_features // layer.d_head
    return Smaller(layer, [i for i in range(num_heads) if i in removed or not removed])
