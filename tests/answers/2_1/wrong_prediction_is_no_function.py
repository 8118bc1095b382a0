def rest_and_row(
    memory_gib, num_params, num_layers, num_heads, num_kv_heads, d_head, bytes_per_element
):
    rest = memory_gib * 2**30 - num_params * bytes_per_element
    return rest, 2 * num_layers * num_kv_heads * d_head * bytes_per_element


def sequences_that_fit(seq_len, **model):
    rest, row = rest_and_row(**model)
    return max(0, rest // (row * seq_len))


def longest_context(batch_size, **model):
    rest, row = rest_and_row(**model)
    return max(0, rest // (row * batch_size))


my_prediction = 69
