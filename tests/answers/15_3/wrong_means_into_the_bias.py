def smaller_layer(up, up_bias, down, down_bias, inputs, num_kept):
    hidden = (inputs @ up.T + up_bias).clamp(min=0)
    score = hidden.std(dim=0) * down.norm(dim=0)
    order = score.argsort(descending=True)
    kept, gone = order[:num_kept], order[num_kept:]
    bias = down_bias + down[:, gone] @ hidden[:, gone].mean(0)
    return up[kept], up_bias[kept], down[:, kept], bias
