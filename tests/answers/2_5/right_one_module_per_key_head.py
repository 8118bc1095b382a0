import torch
from torch import nn
from torch.nn import functional as F


class Group(nn.Module):
    """The query heads of one key head, those that are left of them."""

    def __init__(self, layer, key_head, heads):
        super().__init__()
        E = layer.d_head
        self.num_heads, self.d_head = len(heads), E
        weights = {name: value.detach().clone() for name, value in layer.named_parameters()}
        own = torch.cat([torch.arange(i * E, (i + 1) * E) for i in heads])
        shared = torch.arange(key_head * E, (key_head + 1) * E)
        self.parts = nn.ParameterDict()
        for letter, rows in (("q", own), ("k", shared), ("v", shared)):
            self.parts[letter] = weights[f"{letter}_proj.weight"][rows]
            if f"{letter}_proj.bias" in weights:
                self.parts[f"{letter}b"] = weights[f"{letter}_proj.bias"][rows]
        self.parts["o"] = weights["out_proj.weight"][:, own]

    def forward(self, x, mask):
        q, k, v = (
            F.linear(x, self.parts[name], self.parts[f"{name}b"] if f"{name}b" in self.parts else None)
            for name in "qkv"
        )
        total = 0.0
        for i in range(self.num_heads):
            columns = slice(i * self.d_head, (i + 1) * self.d_head)
            z = F.scaled_dot_product_attention(q[..., columns], k, v, attn_mask=mask)
            total = total + z @ self.parts["o"][:, columns].T
        return total


class Groups(nn.Module):
    def __init__(self, groups, bias):
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x, mask=None):
        total = sum(group(x, mask) for group in self.groups)
        return total if self.bias is None else total + self.bias


def remove_heads(layer, removed):
    per_key = layer.q_proj.out_features // layer.k_proj.out_features
    groups = []
    for key_head in range(layer.k_proj.out_features // layer.d_head):
        heads = [key_head * per_key + m for m in range(per_key)]
        heads = [i for i in heads if i not in set(removed)]
        if heads:
            groups.append(Group(layer, key_head, heads))
    return Groups(groups, layer.out_proj.bias)
