import numpy as np
import torch


def distance_from_one(attention, x, w_q, w_k, w_v):
    x, w_v = (x.clone(), torch.zeros_like(w_v))
    x[..., 0], w_v[0] = (1.0, 1.0)
    return (attention(x, w_q, w_k, w_v) - 1).abs().max().item()


def leak(attention, x, w_q, w_k, w_v):
    y = x.clone()
    y[:, -1] = torch.randn(x.shape[-1])
    a, b = (attention(z, w_q, w_k, w_v).detach().numpy() for z in (x, y))
    return np.abs(a - b)[:, :-1].max()


def mended_attention(x, w_q, w_k, w_v):
    q, k, v = (np.asarray(x @ w) for w in (w_q, w_k, w_v))
    s = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    s[:, ~np.tri(s.shape[1], dtype=bool)] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    return torch.from_numpy(p / p.sum(-1, keepdims=True) @ v)
