from slimlab.classroom.check import numbers


def taken_bytes(sequences, tokens, model):
    layers = range(model["num_layers"])
    per_layer = model["num_kv_heads"] * model["d_head"] * tokens
    keys = sum(per_layer for _ in layers)
    values = sum(per_layer for _ in layers)
    return model["bytes_per_element"] * (model["num_params"] + sequences * (keys + values))


def greatest(fits):
    """The greatest whole number for which fits(number) holds; it holds up to there."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sequences_that_fit(seq_len, **model):
    memory = model["memory_gib"] * 1024**3
    return greatest(lambda n: taken_bytes(n, seq_len, model) <= memory)


def longest_context(batch_size, **model):
    memory = model["memory_gib"] * 1024**3
    return greatest(lambda tokens: taken_bytes(batch_size, tokens, model) <= memory)


def my_prediction():
    return sequences_that_fit(**numbers("2.1"))
