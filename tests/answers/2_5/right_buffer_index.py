import copy

import torch
from torch import nn
from torch.nn import functional as F


class Small(nn.Module):
    def __init__(self, layer, keep):
        super().__init__()
        E = layer.d_head
        group = layer.q_proj.out_features // layer.k_proj.out_features
        kv, inverse = torch.unique(keep // group, return_inverse=True)
        self.register_buffer("which", inverse)
        self.E = E
        inside = torch.arange(E)
        rows, kv_rows = ((heads[:, None] * E + inside).flatten() for heads in (keep, kv))
        for name, index in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            old = getattr(layer, f"{name}_proj")
            new = nn.utils.skip_init(nn.Linear, old.in_features, len(index), bias=old.bias is not None, dtype=old.weight.dtype)
            new.load_state_dict({n: p[index] for n, p in old.state_dict().items()})
            setattr(self, name, new)
        old = layer.out_proj
        self.o = nn.Linear(len(rows), old.out_features, bias=old.bias is not None, dtype=old.weight.dtype)
        state = copy.deepcopy(old.state_dict())
        state["weight"] = state["weight"][:, rows]
        self.o.load_state_dict(state)

    def forward(self, x, mask=None):
        q, k, v = (p(x).unflatten(-1, (-1, self.E)).transpose(1, 2) for p in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k[:, self.which], v[:, self.which], attn_mask=mask)
        return self.o(z.transpose(1, 2).flatten(-2))


def remove_heads(layer, removed):
    keep = torch.ones(layer.q_proj.out_features // layer.d_head, dtype=torch.bool)
    keep[list(removed)] = False
    return Small(layer, keep.nonzero()[:, 0])
