import math

import torch


def head_contributions(layer, x, mask=None):
    B, T, _ = x.shape
    E = layer.d_head
    H, K = layer.q_proj.out_features // E, layer.k_proj.out_features // E
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    W = layer.out_proj.weight
    out = torch.zeros(B, H, T, W.shape[0], dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            g = h * K // H
            for t in range(T):
                seen = [s for s in range(T) if mask is None or mask[t, s]]
                e = [math.exp(float(q[b, t, h * E : h * E + E] @ k[b, s, g * E : g * E + E]) / E**0.5) for s in seen]
                z = sum(w / sum(e) * v[b, s, g * E : g * E + E] for w, s in zip(e, seen))
                out[b, h, t] = W[:, h * E : h * E + E] @ z
    rest = W.new_zeros(W.shape[0]) if layer.out_proj.bias is None else layer.out_proj.bias.clone()
    return out, rest
