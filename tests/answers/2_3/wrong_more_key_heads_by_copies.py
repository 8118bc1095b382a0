import copy

from slimlab.model.attention import MultiHeadAttention


def group_heads(layer, num_kv_heads):
    """Takes more key heads than there are by copying those that there are."""
    E = layer.d_head
    num_heads, old = layer.q_proj.out_features // E, layer.k_proj.out_features // E
    if num_heads % num_kv_heads or max(old, num_kv_heads) % min(old, num_kv_heads):
        raise ValueError("unequal groups")
    new = MultiHeadAttention(
        layer.q_proj.in_features, num_heads, num_kv_heads, E, bias=layer.q_proj.bias is not None
    ).to(layer.q_proj.weight.dtype)
    weights = copy.deepcopy(layer.state_dict())
    for name, weight in weights.items():
        if name.startswith(("k_proj", "v_proj")):
            heads = weight.unflatten(0, (old, E))
            if num_kv_heads > old:
                heads = heads.repeat_interleave(num_kv_heads // old, dim=0)
            else:
                heads = heads.unflatten(0, (num_kv_heads, -1)).mean(dim=1)
            weights[name] = heads.flatten(0, 1)
    new.load_state_dict(weights)
    return new
