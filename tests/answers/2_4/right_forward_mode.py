import math

import torch
from torch import nn


class SharedKeys(nn.Module):
    def __init__(self, d_model, num_heads, num_kv_heads):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.d_head = d_model // num_heads
        self.q_proj = nn.Linear(d_model, num_heads * self.d_head, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.d_head, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.d_head, bias=False)
        self.out_proj = nn.Linear(num_heads * self.d_head, d_model, bias=False)


def leak(layer, x):
    """The whole Jacobian at once, in forward mode, vectorized."""
    slopes = torch.func.jacfwd(layer)(x).abs().amax((0, 2, 3, 5))
    return slopes.triu(1).max().item()


class Mended(SharedKeys):
    def forward(self, x):
        B, T, D = x.shape
        q = self.q_proj(x).unflatten(-1, (self.num_kv_heads, -1, self.d_head))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.d_head))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.d_head))
        scores = torch.einsum("btkge,bske->bkgts", q, k) * self.d_head**-0.5
        scores = scores + torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)
        mixed = torch.einsum("bkgts,bske->btkge", scores.softmax(-1), v)
        return self.out_proj(mixed.flatten(2))
