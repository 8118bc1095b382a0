import copy

from slimlab.model.attention import MultiHeadAttention


def group_heads(layer, num_kv_heads):
    num_heads = layer.q_proj.out_features // layer.d_head
    old_kv_heads = layer.k_proj.out_features // layer.d_head
    if old_kv_heads % num_kv_heads:
        raise ValueError("unequal groups")
    new = MultiHeadAttention(
        layer.q_proj.in_features,
        num_heads,
        num_kv_heads,
        layer.d_head,
        bias=layer.q_proj.bias is not None,
    )
    weights = copy.deepcopy(layer.state_dict())
    for name, weight in weights.items():
        if name.startswith(("k_proj", "v_proj")):
            groups = weight.unflatten(0, (num_kv_heads, -1, layer.d_head))
            weights[name] = groups.mean(dim=1).flatten(0, 1)
    new.load_state_dict(weights)
    return new
