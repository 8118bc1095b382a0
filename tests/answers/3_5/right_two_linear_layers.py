import copy

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": torch.relu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "swiglu": lambda u: F.silu(u.chunk(2, dim=-1)[0]) * u.chunk(2, dim=-1)[1],
}


def joined(weights, dim):
    weight = torch.cat([one.detach() for one in weights], dim)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


class Parallel(nn.Module):
    def __init__(self, norm, attention, feed_forward):
        super().__init__()
        self.norm, self.kind, self.E = copy.deepcopy(norm), feed_forward.kind, attention.d_head
        self.sizes = [attention.q_proj.out_features, attention.k_proj.out_features]
        first = [feed_forward.up_proj.weight]
        if self.kind == "swiglu":
            first.insert(0, feed_forward.gate_proj.weight)
        projections = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        self.reader = joined([*projections, *first], 0)
        self.writer = joined([attention.out_proj.weight, feed_forward.down_proj.weight], 1)

    def forward(self, x, mask=None):
        a, b = self.sizes
        made = self.reader(self.norm(x))
        q, k, v = (
            part.unflatten(-1, (-1, self.E)).transpose(-3, -2)
            for part in (made[..., :a], made[..., a : a + b], made[..., a + b : a + 2 * b])
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        bent = ACTIVATIONS[self.kind](made[..., a + 2 * b :])
        return x + self.writer(torch.cat([heads.transpose(-3, -2).flatten(-2), bent], dim=-1))
