import math
import torch
from slimlab.model.masks import causal_mask


def leak(attention, x, w_q, w_k, w_v):
    changed = x.clone()
    changed[:, -1] += 1.0
    before, after = (attention(x, w_q, w_k, w_v), attention(changed, w_q, w_k, w_v))
    return (after - before)[:, :-1].abs().max().item()


def distance_from_one(attention, x, w_q, w_k, w_v):
    x, w_v = (x.clone(), torch.zeros_like(w_v))
    x[..., 0], w_v[0] = (1.0, 1.0)
    return (attention(x, w_q, w_k, w_v) - 1).abs().max().item()


def mended_attention(x, w_q, w_k, w_v):
    T, d_head = (x.shape[1], w_q.shape[1])
    query, key, value = (x @ w_q, x @ w_k, x @ w_v)
    scores = query @ key.transpose(1, 2) / math.sqrt(d_head)
    scores = scores.masked_fill(~causal_mask(T), -100)
    return scores.softmax(dim=-1) @ value
