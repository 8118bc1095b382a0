import torch


def leak(attention, x, w_q, w_k, w_v):
    # The derivative of every earlier output with respect to the last token.
    x = x.clone().requires_grad_()
    worst = 0.0
    for t in range(x.shape[1] - 1):
        (gradient,) = torch.autograd.grad(attention(x, w_q, w_k, w_v)[:, t].sum(), x)
        worst = max(worst, float(gradient[:, -1].abs().max()))
    return worst


def distance_from_one(attention, x, w_q, w_k, w_v):
    # A last feature of ones, which only the values look at.
    ones = torch.ones_like(x[..., :1])
    still = torch.zeros_like(w_q[:1])
    output = attention(
        torch.cat([x, ones], dim=-1),
        torch.cat([w_q, still]),
        torch.cat([w_k, still]),
        torch.cat([torch.zeros_like(w_v), torch.ones_like(w_v[:1])]),
    )
    return float(torch.max(torch.abs(output - 1)))


def mended_attention(x, w_q, w_k, w_v):
    outputs = []
    for sentence in x:
        rows = []
        for t in range(len(sentence)):
            past = sentence[: t + 1]
            scores = (past @ w_k) @ (sentence[t] @ w_q) * w_q.shape[1] ** -0.5
            rows.append(scores.softmax(dim=0) @ (past @ w_v))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)
