import math

import torch
from torch import nn


class SharedKeys(nn.Module):
    """Causal self-attention, num_heads query heads on num_kv_heads key heads."""

    def __init__(self, d_model, num_heads, num_kv_heads):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.d_head = d_model // num_heads
        self.q_proj = nn.Linear(d_model, num_heads * self.d_head, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.d_head, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.d_head, bias=False)
        self.out_proj = nn.Linear(num_heads * self.d_head, d_model, bias=False)


def leak(layer, x, step=1e-5):
    """Move one number of the input at a time and watch the earlier outputs."""
    greatest = 0.0
    B, T, D = x.shape
    with torch.no_grad():
        for s in range(1, T):
            for e in range(D):
                up, down = x.clone(), x.clone()
                up[:, s, e] += step
                down[:, s, e] -= step
                slope = (layer(up) - layer(down))[:, :s] / (2 * step)
                greatest = max(greatest, float(slope.abs().max()))
    return greatest


class Mended(SharedKeys):
    def forward(self, x):
        T, E = x.shape[1], self.d_head
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        heads = []
        for i in range(self.num_heads):
            k = i * self.num_kv_heads // self.num_heads
            own, shared = slice(i * E, (i + 1) * E), slice(k * E, (k + 1) * E)
            scores = query[..., own] @ key[..., shared].mT / E**0.5
            weights = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
            heads.append(weights @ value[..., shared])
        return self.out_proj(torch.cat(heads, dim=-1))
