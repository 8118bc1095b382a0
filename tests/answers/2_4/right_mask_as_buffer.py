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
    """The whole Jacobian at once, vectorized."""
    slopes = torch.func.jacrev(layer)(x).abs().amax((0, 2, 3, 5))
    return slopes.triu(1).max().item()


class Mended(SharedKeys):
    def __init__(self, d_model, num_heads, num_kv_heads):
        super().__init__(d_model, num_heads, num_kv_heads)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(self, x):
        T = x.shape[1]
        q, k, v = (
            p(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        copies = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        scores = q @ k.mT / math.sqrt(self.d_head)
        weights = scores.masked_fill(~self.mask[:T, :T], -math.inf).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))
