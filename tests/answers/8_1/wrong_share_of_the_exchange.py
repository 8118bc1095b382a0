import math

from slimlab.classroom.check import numbers


def my_prediction():
    """The stage that fits your model, and gigabytes on the wire."""
    given = numbers("8.1")  # by hand: 18, 6 + 12 / w, 2 + 16 / w and 18 / w bytes per parameter
    model = given["params_billion"] * 1e9, given["world_size"]
    stage = smallest_stage(*model, given["free_gb"] * 1e9)
    m = given["num_micro_batches"]
    sent = {one: wire_bytes(*model, one, m) / 1e9 for one in (1, stage)}
    return {"stage": stage, "gb": sent[stage], "stage_1_gb": sent[1]}


def smallest_stage(num_params, world_size, free_bytes):
    """The smallest stage of ZeRO that fits, or None."""
    per_param = 18  # stage by stage: optimizer, gradients, weights are cut
    for stage, cut in enumerate((0, 12, 4, 2)):
        per_param += cut / world_size - cut
        if num_params * per_param <= free_bytes:
            return stage
    return None


def wire_bytes(num_params, world_size, stage, num_micro_batches):
    """The bytes that a rank sends in one step."""
    m = num_micro_batches
    per_param = {
        0: 4 + 4,  # an all_reduce is a reduce_scatter and an all_gather, of gradients both
        1: 4 + 2,  # here new weights are gathered, with half the bytes
        2: 4 * m + 2,  # no place for whole gradients: they leave after each micro-batch
        3: 4 * m + 2 * 2 * m,  # weights come for each pass, and not after the update
    }[stage]
    return num_params * per_param * (world_size - 1) / world_size


def largest_degree(num_params, batch_tokens, flop_per_s, bytes_per_s, stage, share):
    """The largest number of ranks at which arithmetic is at least `share` of the time."""
    per_param = (8, 6, 6, 8)[stage]
    # 6 B / (w F) >= share (6 B / (w F) + k (w - 1) / (w L)), times w: both sides have Psi
    arithmetic_s, exchange_s = 6 * batch_tokens / flop_per_s, per_param / bytes_per_s
    return 1 + math.floor(arithmetic_s / (share * exchange_s))
