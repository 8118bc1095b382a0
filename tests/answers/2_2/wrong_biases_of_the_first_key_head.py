import torch
from torch.nn import functional as F


def head_contributions(layer, x, mask=None):
    """Ties the weights of shared heads, and takes the first biases for all."""
    E = layer.d_head
    H, K = layer.q_proj.out_features // E, layer.k_proj.out_features // E
    parts = []
    for i in range(H):
        own, shared = slice(i * E, (i + 1) * E), slice(i // (H // K) * E, (i // (H // K) + 1) * E)
        bq = bk = bv = None
        if layer.q_proj.bias is not None:
            bq, bk, bv = layer.q_proj.bias[own], layer.k_proj.bias[:E], layer.v_proj.bias[:E]
            if H == K:
                bk, bv = layer.k_proj.bias[own], layer.v_proj.bias[own]
        q = F.linear(x, layer.q_proj.weight[own], bq)
        k = F.linear(x, layer.k_proj.weight[shared], bk)
        v = F.linear(x, layer.v_proj.weight[shared], bv)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        parts.append(z @ layer.out_proj.weight[:, own].T)
    bias = layer.out_proj.bias
    rest = torch.zeros_like(x[0, 0]) if bias is None else bias
    return torch.stack(parts, 1), rest
