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
    x = x.detach().clone().requires_grad_()
    output, greatest = layer(x), 0.0
    B, T, D = x.shape
    for t in range(T - 1):
        for d in range(output.shape[2]):
            (slope,) = torch.autograd.grad(output[:, t, d].sum(), x, retain_graph=True)
            greatest = max(greatest, slope[:, t + 1 :].abs().max().item())
    return greatest


class Mended(SharedKeys):
    def forward(self, x):
        B, T, D = x.shape
        query = self.q_proj(x).view(B, T, self.num_heads, self.d_head).transpose(1, 2)
        key = self.k_proj(x).view(B, T, self.num_kv_heads, self.d_head).transpose(1, 2)
        value = self.v_proj(x).view(B, T, self.num_kv_heads, self.d_head).transpose(1, 2)
        copies = self.num_heads // self.num_kv_heads
        key, value = (heads.repeat_interleave(copies, dim=1) for heads in (key, value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(D)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        heads = weights @ value
        return self.out_proj(heads.transpose(1, 2).reshape(B, T, -1))
