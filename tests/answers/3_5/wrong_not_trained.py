import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


class Parallel(nn.Module):
    def __init__(self, norm, attention, feed_forward):
        super().__init__()
        self.norm, self.d_head = copy.deepcopy(norm), attention.d_head
        self.kind = feed_forward.kind
        read = [attention.q_proj, attention.k_proj, attention.v_proj, feed_forward.up_proj]
        if self.kind == "swiglu":
            read.append(feed_forward.gate_proj)
        write = [attention.out_proj, feed_forward.down_proj]
        self.widths = [linear.out_features for linear in read]
        self.register_buffer("read", torch.cat([linear.weight.detach() for linear in read], dim=0))
        self.write = nn.Parameter(torch.cat([linear.weight.detach() for linear in write], dim=1))

    def forward(self, x, mask=None):
        B, T, D = x.shape
        n = self.norm(x)
        query, key, value, up, *gate = F.linear(n, self.read).split(self.widths, dim=-1)
        query, key, value = (
            part.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for part in (query, key, value)
        )
        copies = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(copies, dim=1) for part in (key, value))
        scores = query @ key.mT / math.sqrt(self.d_head)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        heads = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(B, T, -1)
        if self.kind == "swiglu":
            bent = F.silu(gate[0]) * up
        elif self.kind == "relu":
            bent = F.relu(up)
        else:
            bent = F.gelu(up, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return x + F.linear(torch.cat([heads, bent], dim=-1), self.write)
