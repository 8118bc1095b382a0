import torch


def distance_from_one(attention, x, w_q, w_k, w_v):
    x, w_v = (x.clone(), torch.zeros_like(w_v))
    x[..., 0], w_v[0] = (1.0, 1.0)
    return (attention(x, w_q, w_k, w_v) - 1).abs().max().item()


def leak(attention, x, w_q, w_k, w_v):
    before = attention(x, w_q, w_k, w_v)
    x[:, -1] = 0
    after = attention(x, w_q, w_k, w_v)
    return torch.linalg.norm((after - before)[:, :-1])


def mended_attention(x, w_q, w_k, w_v):
    q, k, v = (torch.einsum("btd,de->bte", x, w) for w in (w_q, w_k, w_v))
    s = torch.einsum("bte,bse->bts", q, k) * w_q.size(-1) ** (-0.5)
    s += torch.full((x.size(1),) * 2, -1e30, dtype=s.dtype).triu(1)
    return torch.einsum("bts,bse->bte", torch.softmax(s, 2), v)
