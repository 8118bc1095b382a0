import torch

from slimlab.model.attention import MultiHeadAttention


def group_heads(layer, num_kv_heads):
    """The mean as one matrix that acts on the rows."""
    E = layer.d_head
    old = layer.k_proj.out_features // E
    if num_kv_heads < 1 or old % num_kv_heads != 0:
        raise ValueError(f"{num_kv_heads} groups of {old}")
    size = old // num_kv_heads
    pool = torch.kron(torch.eye(num_kv_heads), torch.ones(1, size) / size)
    pool = torch.kron(pool, torch.eye(E)).double()
    like = layer.q_proj.weight
    new = MultiHeadAttention(
        like.shape[1], like.shape[0] // E, num_kv_heads, E, bias=layer.k_proj.bias is not None
    ).to(like)
    with torch.no_grad():
        for (name, target), source in zip(new.named_parameters(), layer.parameters()):
            target.copy_(pool.to(source) @ source if name[0] in "kv" else source)
    return new
