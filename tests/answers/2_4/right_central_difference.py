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


def leak(layer, x, h=1e-4):
    best = torch.zeros(())
    with torch.no_grad():
        for s in range(1, x.shape[1]):
            for e in range(x.shape[2]):
                step = torch.zeros_like(x)
                step[:, s, e] = h
                slope = (layer(x + step) - layer(x - step)) / (2 * h)
                best = torch.maximum(best, slope[:, :s].abs().max())
    return best


class Mended(SharedKeys):
    def forward(self, x):
        """A loop over heads."""
        T, E, parts = x.shape[1], self.d_head, []
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        for head in range(self.num_heads):
            shared = head // (self.num_heads // self.num_kv_heads)
            own, other = slice(head * E, head * E + E), slice(shared * E, shared * E + E)
            parts.append(
                nn.functional.scaled_dot_product_attention(
                    q[..., own], k[..., other], v[..., other], is_causal=True
                )
            )
        return self.out_proj(torch.cat(parts, dim=-1))
