import torch


def smaller_layer(up, up_bias, down, down_bias, inputs, num_kept):
    """The four tensors of a layer with num_kept neurons."""
    hidden = (inputs @ up.T + up_bias).clamp(min=0)
    centred = hidden - hidden.mean(0)  # what is constant goes into the bias
    gram = centred.T @ centred
    gram = gram + 1e-11 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    kept = (centred.norm(dim=0) * down.norm(dim=0)).topk(num_kept).indices
    inverse = torch.linalg.inv(gram[kept][:, kept])
    new_down = down @ gram[:, kept] @ inverse  # least squares
    bias = down_bias + down @ hidden.mean(0) - new_down @ hidden[:, kept].mean(0)
    return up[kept], up_bias[kept], new_down, bias
