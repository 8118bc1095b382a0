import math

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("9.1")
    sizes = [given[name] for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size")]
    degree, key_heads = max(legal_degrees(*sizes)), sizes[1]
    per_block = 2 + 2  # attention and feed-forward, forward and backward
    calls = given["num_layers"] * per_block + 1 + 1
    shared = degree > key_heads
    return {
        "degree": degree,
        "copies": degree / key_heads if shared else 1,
        "stream_sums": calls,
        "copy_sums": given["num_layers"] * (1 + 1) if shared else 0,
        "gigabytes": round(calls * given["num_tokens"] * given["d_model"] * 2 / 1e9, 2),
    }


def legal_degrees(num_heads, num_kv_heads, d_ff, vocab_size):
    found = []
    most = math.gcd(num_heads, d_ff, vocab_size)  # what divides all three divides this
    for degree in range(1, most + 1):
        if most % degree == 0 and math.gcd(degree, num_kv_heads) in (degree, num_kv_heads):
            found.append(degree)
    return tuple(found)


def held_params(num_layers, d_model, num_heads, num_kv_heads, d_ff, vocab_size, degree):
    d_head = d_model // num_heads
    own_heads = num_heads // degree
    own_kv_heads = -(-num_kv_heads // degree)
    total = d_model + (vocab_size // degree) * d_model
    for _ in range(num_layers):
        total += (2 * own_heads + 2 * own_kv_heads) * d_head * d_model
        total += 3 * (d_ff // degree) * d_model
        total += 2 * d_model
    return total


def smallest_degree(num_layers, d_model, num_heads, num_kv_heads, d_ff, vocab_size, device_bytes):
    fits = [
        degree
        for degree in legal_degrees(num_heads, num_kv_heads, d_ff, vocab_size)
        if held_params(num_layers, d_model, num_heads, num_kv_heads, d_ff, vocab_size, degree) * 16
        <= device_bytes
    ]
    return min(fits, default=0)
