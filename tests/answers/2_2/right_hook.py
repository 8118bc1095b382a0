import torch


def head_contributions(layer, x, mask=None):
    """Catch what out_proj receives, and read its linear map from pieces of that."""
    caught = []
    handle = layer.out_proj.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    layer(x, mask=mask)
    handle.remove()
    side_by_side = caught[0]
    nothing = layer.out_proj(torch.zeros_like(side_by_side[:1, :1]))[0, 0]
    parts = []
    for start in range(0, side_by_side.shape[-1], layer.d_head):
        one = torch.zeros_like(side_by_side)
        one[..., start : start + layer.d_head] = side_by_side[..., start : start + layer.d_head]
        parts.append(layer.out_proj(one) - nothing)
    return torch.stack(parts, dim=1), nothing
