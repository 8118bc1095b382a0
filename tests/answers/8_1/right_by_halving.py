from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("8.1")
    w, m = given["world_size"], given["num_micro_batches"]
    needs = [18, 6 + 12 / w, 2 + 16 / w, 18 / w]
    stage = [given["params_billion"] * one < given["free_gb"] for one in needs].index(True)
    ring = given["params_billion"] * (w - 1) / w
    return {"stage": stage, "gb": (8, 6, 4 * m + 2, 8 * m)[stage] * ring, "stage_1_gb": 6 * ring}


def smallest_stage(num_params, world_size, free_bytes):
    whole, cut = [2, 4, 12], []
    for stage in range(4):
        if num_params * (sum(whole) + sum(cut) / world_size) <= free_bytes:
            return stage
        if whole:
            cut.append(whole.pop())


def wire_bytes(num_params, world_size, stage, num_micro_batches):
    gathers, reduces = {
        0: (0, 2),
        1: (1, 1),
        2: (1, num_micro_batches),
        3: (2 * num_micro_batches, num_micro_batches),
    }[stage]
    per_rank = num_params / world_size  # the part that goes on w - 1 times
    return (world_size - 1) * per_rank * (2 * gathers + 4 * reduces)


def largest_degree(num_params, batch_tokens, flop_per_s, bytes_per_s, stage, share):
    low, high = 1, 2
    while _efficiency(num_params, high, batch_tokens, flop_per_s, bytes_per_s, stage) >= share:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _efficiency(num_params, middle, batch_tokens, flop_per_s, bytes_per_s, stage) >= share:
            low = middle
        else:
            high = middle
    return low


def _efficiency(num_params, w, batch_tokens, flop_per_s, bytes_per_s, stage):
    arithmetic_s = 6 * num_params * batch_tokens / w / flop_per_s
    return arithmetic_s / (arithmetic_s + wire_bytes(num_params, w, stage, 1) / bytes_per_s)
