import math

import torch

from slimlab.model.masks import causal_mask


def leak(attention, x, w_q, w_k, w_v):
    changed = x.clone()
    changed[:, -1] += 1.0
    before, after = attention(x, w_q, w_k, w_v), attention(changed, w_q, w_k, w_v)
    return (after - before)[:, :-1].abs().max().item()


def distance_from_one(attention, x, w_q, w_k, w_v):
    x = x.clone()
    x[..., 0] = 1.0
    w_v = torch.zeros_like(w_v)
    w_v[0] = 1.0
    return (attention(x, w_q, w_k, w_v) - 1).abs().max().item()


def mended_attention(x, w_q, w_k, w_v):
    query, key, value = x @ w_q, x @ w_k, x @ w_v
    scores = query @ key.transpose(1, 2) / math.sqrt(w_q.shape[1])
    weights = scores.softmax(dim=-1) * causal_mask(x.shape[1])
    return weights / weights.sum(dim=-1, keepdim=True) @ value
