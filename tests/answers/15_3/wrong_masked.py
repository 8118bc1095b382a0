import torch


def smaller_layer(up, up_bias, down, down_bias, inputs, num_kept):
    hidden = (inputs @ up.T + up_bias).clamp(min=0)
    score = hidden.std(dim=0) * down.norm(dim=0)
    mask = torch.zeros(len(up), dtype=torch.bool)
    mask[score.topk(num_kept).indices] = True
    return up * mask[:, None], up_bias * mask, down * mask, down_bias
