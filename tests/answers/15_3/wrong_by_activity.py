def smaller_layer(up, up_bias, down, down_bias, inputs, num_kept):
    hidden = (inputs @ up.T + up_bias).clamp(min=0)
    kept = (hidden.norm(dim=0) * down.norm(dim=0)).topk(num_kept).indices
    return up[kept], up_bias[kept], down[:, kept], down_bias
