from slimlab.classroom.check import numbers


def my_prediction():
    """What the largest legal degree of your model costs."""
    given = numbers("9.1")  # by hand: the largest divisor of all three that fits the key heads
    names = ("num_heads", "num_kv_heads", "d_ff", "vocab_size")
    degree = legal_degrees(*(given[name] for name in names))[-1]
    copies = max(1, degree // given["num_kv_heads"])
    sums = 4 * given["num_layers"] + 2
    return {
        "degree": degree,
        "copies": copies,
        "stream_sums": sums,
        "copy_sums": 2 * given["num_layers"] if copies > 1 else 0,  # k_proj and v_proj
        "gigabytes": sums * given["num_tokens"] * given["d_model"] * 2 / 1e9,
    }


def legal_degrees(num_heads, num_kv_heads, d_ff, vocab_size):
    """All legal degrees in increasing order."""
    return [
        w
        for w in range(1, num_heads + 1)
        if num_heads % w == d_ff % w == vocab_size % w == 0
        and (num_kv_heads % w == 0 or w % num_kv_heads == 0)
    ]


def held_params(num_layers, d_model, num_heads, num_kv_heads, d_ff, vocab_size, degree):
    """How many parameters a rank holds."""
    kv_heads = max(1, num_kv_heads // degree)
    keys_and_values = 2 * d_model * kv_heads * (d_model // num_heads)
    cut = 2 * d_model * d_model // degree + 3 * d_model * d_ff // degree
    block = cut + keys_and_values + 2 * d_model
    return num_layers * block + vocab_size * d_model // degree + d_model


def smallest_degree(num_layers, d_model, num_heads, num_kv_heads, d_ff, vocab_size, device_bytes):
    """The smallest legal degree that fits, or 0."""
    sizes = num_heads, num_kv_heads, d_ff, vocab_size
    for w in legal_degrees(*sizes):
        if 16 * held_params(num_layers, d_model, *sizes, 1) <= w * device_bytes:
            return w
    return 0
