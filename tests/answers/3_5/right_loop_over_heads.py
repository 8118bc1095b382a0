import copy

import torch
from torch import nn


class Parallel(nn.Module):
    def __init__(self, norm, attention, feed_forward):
        super().__init__()
        names = ["up_proj", "gate_proj"] if feed_forward.kind == "swiglu" else ["up_proj"]
        self.kind, self.norm = feed_forward.kind, copy.deepcopy(norm)
        self.E, self.F = attention.d_head, feed_forward.up_proj.out_features
        self.H = attention.q_proj.out_features // self.E
        self.K = attention.k_proj.out_features // self.E
        rows = [getattr(attention, f"{name}_proj").weight.T for name in "qkv"]
        rows += [getattr(feed_forward, name).weight.T for name in names]
        self.W_in = nn.Parameter(torch.cat(rows, dim=1).detach().clone())
        columns = [attention.out_proj.weight.T, feed_forward.down_proj.weight.T]
        self.W_out = nn.Parameter(torch.cat(columns, dim=0).detach().clone())

    def forward(self, x, mask=None):
        made, E, H, K = self.norm(x) @ self.W_in, self.E, self.H, self.K
        results = []
        for head in range(H):
            shared = head * K // H
            q = made[..., head * E : (head + 1) * E]
            k = made[..., (H + shared) * E : (H + shared + 1) * E]
            v = made[..., (H + K + shared) * E : (H + K + shared + 1) * E]
            scores = q @ k.transpose(1, 2) * E**-0.5
            if mask is not None:
                scores = torch.where(mask, scores, -torch.inf)
            results.append(scores.softmax(-1) @ v)
        up = made[..., (H + 2 * K) * E :][..., : self.F]
        if self.kind == "swiglu":
            gate = made[..., -self.F :]
            bent = gate * torch.sigmoid(gate) * up
        elif self.kind == "relu":
            bent = up.clamp(min=0)
        elif self.kind == "gelu":
            bent = up * (1 + torch.erf(up * 0.5**0.5)) / 2
        else:
            bent = up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3))) / 2
        return torch.cat([*results, bent], dim=-1) @ self.W_out + x
