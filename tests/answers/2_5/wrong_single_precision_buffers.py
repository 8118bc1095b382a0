from torch import nn
from torch.nn import functional as F


class Left(nn.Module):
    def __init__(self, layer, kept):
        super().__init__()
        E = self.d_head = layer.d_head
        group = layer.q_proj.out_features // layer.k_proj.out_features
        kept_kv = sorted({head // group for head in kept})
        self.key_head = [kept_kv.index(head // group) for head in kept]
        rows = [head * E + e for head in kept for e in range(E)]
        kv_rows = [head * E + e for head in kept_kv for e in range(E)]
        for letter, index in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            old = getattr(layer, f"{letter}_proj")
            self.keep(f"{letter}_weight", old.weight[index])
            self.keep(f"{letter}_bias", None if old.bias is None else old.bias[index])
        self.keep("out_weight", layer.out_proj.weight[:, rows])
        self.keep("out_bias", layer.out_proj.bias)

    def keep(self, name, numbers):
        self.register_buffer(name, None if numbers is None else numbers.detach().float())

    def forward(self, x, mask=None):
        x = x.float()
        q, k, v = (
            F.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))
            .unflatten(-1, (-1, self.d_head))
            .transpose(1, 2)
            for name in "qkv"
        )
        k, v = k[:, self.key_head], v[:, self.key_head]
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(heads.transpose(1, 2).flatten(2), self.out_weight, self.out_bias)


def remove_heads(layer, removed):
    num_heads = layer.q_proj.out_features // layer.d_head
    return Left(layer, [head for head in range(num_heads) if head not in removed])
