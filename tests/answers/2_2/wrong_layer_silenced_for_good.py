import torch


def head_contributions(layer, x, mask=None):
    num_heads = layer.out_proj.in_features // layer.d_head
    whole = layer.out_proj.weight.detach().clone()
    bias = layer.out_proj.bias
    rest = torch.zeros(layer.out_proj.out_features, dtype=x.dtype) if bias is None else bias
    parts = []
    for i in range(num_heads):
        columns = slice(i * layer.d_head, (i + 1) * layer.d_head)
        layer.out_proj.weight.data.zero_()
        layer.out_proj.weight.data[:, columns] = whole[:, columns]
        parts.append(layer(x, mask=mask) - rest)
    return torch.stack(parts, dim=1), rest
