from slimlab.classroom.check import numbers


def my_prediction():
    return sequences_that_fit(**numbers("2.1"))


def sequences_that_fit(
    memory_gib, num_params, num_layers, num_heads, num_kv_heads, d_head, seq_len, bytes_per_element
):
    rest = memory_gib * 2**30 - num_params * bytes_per_element
    return max(0, rest // (2 * num_layers * num_kv_heads * d_head * bytes_per_element * seq_len + num_params * bytes_per_element))


def longest_context(
    batch_size, memory_gib, num_params, num_layers, num_heads, num_kv_heads, d_head, bytes_per_element
):
    rest = memory_gib * 2**30 - num_params * bytes_per_element
    return max(0, rest // (2 * num_layers * num_kv_heads * d_head * bytes_per_element * batch_size))
