from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("7.1")
    w = given["world_size"]
    steps = len(bin(w - 1)) - 2
    unit = 1000 * given["latency_us"] * given["gbytes_per_s"]  # bytes that take one latency
    return round(unit * (w - 1 - steps) * w / (steps * w - w + 1))


def tree_s(world_size, n_bytes, alpha_s, beta_s):
    total_s, reached = 0.0, 1
    while reached < world_size:
        total_s += 2 * (alpha_s + beta_s * n_bytes)
        reached *= 2
    return total_s


def equal_bytes(world_size, alpha_s, beta_s):
    if world_size <= 3:
        return 0
    fixed = 2 * (world_size - 1) * alpha_s - tree_s(world_size, 0, alpha_s, beta_s)
    slope = tree_s(world_size, 1, alpha_s, beta_s) - tree_s(world_size, 0, alpha_s, beta_s)
    return fixed / (slope - 2 * (world_size - 1) / world_size * beta_s)


def smallest_bucket(world_size, share, alpha_s, beta_s):
    steps = 2 * (world_size - 1)
    latency_s = steps * alpha_s
    total_s = latency_s / (1 - share)
    return (total_s - latency_s) / (steps / world_size * beta_s)
