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
    """One vector-Jacobian product for each output number, all at once."""
    B, T, D = x.shape
    basis = torch.eye(T * D, dtype=x.dtype).view(T * D, 1, T, D).expand(-1, B, -1, -1)
    output, pull = torch.func.vjp(layer, x)
    slopes = torch.stack([pull(one.contiguous())[0] for one in basis]).view(T, D, B, T, D)
    future = torch.ones(T, T).triu(1).bool()
    return slopes.abs().amax((1, 2, 4))[future].amax().item()


class Right(SharedKeys):
    def forward(self, x):
        B, T, D = x.shape
        q = self.q_proj(x).unflatten(-1, (self.num_kv_heads, -1, self.d_head))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.d_head))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.d_head))
        scores = torch.einsum("btkge,bske->bkgts", q, k) * self.d_head**-0.5
        scores = scores + torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)
        mixed = torch.einsum("bkgts,bske->btkge", scores.softmax(-1), v)
        return self.out_proj(mixed.flatten(2))


Mended = Right(12, 6, 2)
