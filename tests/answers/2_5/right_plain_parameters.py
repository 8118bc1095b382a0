import torch
from torch import nn


class Left(nn.Module):
    def __init__(self, layer, kept):
        super().__init__()
        H, E = layer.q_proj.out_features // layer.d_head, layer.d_head
        self.per = H * E // layer.k_proj.out_features
        self.kept, self.E = kept, E
        needed = {h // self.per for h in kept}
        def cut(tensor, heads):
            pieces = tensor.detach().clone().split(E)
            return nn.ParameterDict({str(h): pieces[h] for h in heads})
        self.q, self.k, self.v = (cut(p.weight, hs) for p, hs in ((layer.q_proj, kept), (layer.k_proj, needed), (layer.v_proj, needed)))
        self.o = cut(layer.out_proj.weight.T, kept)
        self.with_bias = layer.q_proj.bias is not None
        if self.with_bias:
            self.bq, self.bk, self.bv = (cut(p.bias, hs) for p, hs in ((layer.q_proj, kept), (layer.k_proj, needed), (layer.v_proj, needed)))
            self.bo = nn.Parameter(layer.out_proj.bias.detach().clone())

    def forward(self, x, mask=None):
        out = 0
        for h in self.kept:
            g = str(h // self.per)
            q, k, v = x @ self.q[str(h)].T, x @ self.k[g].T, x @ self.v[g].T
            if self.with_bias:
                q, k, v = q + self.bq[str(h)], k + self.bk[g], v + self.bv[g]
            s = q @ k.transpose(1, 2) / self.E**0.5
            if mask is not None:
                s = torch.where(mask, s, -torch.inf)
            out = out + s.softmax(-1) @ v @ self.o[str(h)]
        return out + self.bo if self.with_bias else out


def remove_heads(layer, removed):
    return Left(layer, sorted(set(range(layer.q_proj.out_features // layer.d_head)) - set(removed)))
