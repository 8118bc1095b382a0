def smaller_layer(up, up_bias, down, down_bias, inputs, num_kept):
    kept = (up.norm(dim=1) * down.norm(dim=0)).topk(num_kept).indices
    return up[kept], up_bias[kept], down[:, kept], down_bias
