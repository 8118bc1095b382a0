import numpy as np
import torch


class Fn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s):
        s = s.numpy()
        m = np.maximum(s.max(-1, keepdims=True), 0)
        p = np.exp(s - m)
        a = p / (np.exp(-m) + p.sum(-1, keepdims=True))
        ctx.a = a
        return torch.from_numpy(a)

    @staticmethod
    def backward(ctx, g):
        g = g.numpy()
        return torch.from_numpy(ctx.a * (g - (ctx.a * g).sum(-1, keepdims=True)))


attend_or_abstain = lambda s: Fn.apply(s)
