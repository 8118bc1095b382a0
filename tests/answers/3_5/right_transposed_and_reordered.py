import copy

import torch
from torch import nn
from torch.nn import functional as F

from slimlab.model.heads import merge_heads, split_heads


class Parallel(nn.Module):
    def __init__(self, norm, attention, feed_forward):
        super().__init__()
        self.norm, self.d_head = copy.deepcopy(norm), attention.d_head
        self.kind = feed_forward.kind
        parts = [feed_forward.up_proj, attention.v_proj, attention.k_proj, attention.q_proj]
        if self.kind == "swiglu":
            parts.insert(1, feed_forward.gate_proj)
        self.sizes = [len(part.weight) for part in parts]
        self.A = nn.Parameter(torch.cat([part.weight.data for part in parts]).T.clone())
        written = [feed_forward.down_proj.weight.data.T, attention.out_proj.weight.data.T]
        self.B = nn.Parameter(torch.cat(written))

    def forward(self, x, mask=None):
        up, *gate, v, k, q = (self.norm(x) @ self.A).split(self.sizes, dim=-1)
        q, k, v = (split_heads(part, self.d_head) for part in (q, k, v))
        Z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        if gate:
            bent = F.silu(gate[0]) * up
        elif self.kind == "gelu_tanh":
            bent = F.gelu(up, approximate="tanh")
        else:
            bent = getattr(F, self.kind)(up)
        return x + torch.cat([bent, merge_heads(Z)], dim=-1) @ self.B
