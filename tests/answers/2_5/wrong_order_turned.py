import copy
import math

import torch
from torch import nn

from slimlab.model.heads import split_heads


class Smaller(nn.Module):
    def __init__(self, layer, kept):
        super().__init__()
        E = self.d_head = layer.d_head
        group = layer.q_proj.out_features // layer.k_proj.out_features
        kept_kv = sorted({head // group for head in kept})
        self.key_head = [kept_kv.index(head // group) for head in kept]
        rows = [head * E + e for head in kept for e in range(E)]
        kv_rows = [head * E + e for head in kept_kv for e in range(E)]
        for name, used in (("q_proj", rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            linear = copy.deepcopy(getattr(layer, name))
            for part, numbers_of_all in list(linear.named_parameters()):
                setattr(linear, part, nn.Parameter(numbers_of_all.detach()[used]))
            setattr(self, name, linear)
        self.out_proj = copy.deepcopy(layer.out_proj)
        self.out_proj.weight = nn.Parameter(layer.out_proj.weight.detach()[:, sorted(rows)])

    def forward(self, x, mask=None):
        query = split_heads(self.q_proj(x), self.d_head)
        key = split_heads(self.k_proj(x), self.d_head)[:, self.key_head]
        value = split_heads(self.v_proj(x), self.d_head)[:, self.key_head]
        scores = query @ key.mT / math.sqrt(self.d_head)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        heads = torch.softmax(scores, dim=-1) @ value
        return self.out_proj(heads.transpose(1, 2).flatten(2))


def remove_heads(layer, removed):
    num_heads = layer.q_proj.out_features // layer.d_head
    return Smaller(layer, [head for head in reversed(range(num_heads)) if head not in removed])
