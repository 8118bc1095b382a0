from dataclasses import replace
from itertools import product

from slimlab.classroom.check import numbers
from slimlab.plan.hardware import Constants, find_cluster
from slimlab.plan.known_models import find_model
from slimlab.plan.layout_memory import rank_bytes
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.planner import look_at


def given_cluster(hardware):
    """The cluster of part 3: hosts of 4 GPUs, half the network."""
    cluster = find_cluster(hardware)
    return replace(cluster, gpus_per_host=4, network_bytes_per_s=cluster.network_bytes_per_s / 2)


def what_binds(config, parallel, num_gpus, batch_size, limit_bytes):
    """What holds this layout back, in a word."""
    cut = config.num_heads, config.d_ff
    if parallel.world_size != num_gpus:
        return "gpus"
    if any(size % parallel.tensor for size in cut):
        return "heads"
    if config.num_layers % parallel.pipeline:
        return "layers"
    if batch_size % (parallel.data * parallel.micro_batch_size):
        return "batch"
    items = rank_bytes(config, parallel, batch_size)
    if sum(items.get(kind, 0) for kind in ("weights", "gradients", "optimizer")) > limit_bytes:
        return "state"
    return "activations" if sum(items.values()) > limit_bytes else "nothing"


def what_helps(config, parallel, batch_size, limit_bytes):
    """The single changes that make a layout fit."""
    changes = {"micro_batch_size": 1, "recompute": "full", "sequence_parallel": True}
    changes["zero_stage"] = 1

    def fits(name, value):
        changed = replace(parallel, **{name: value})
        return (
            sum(rank_bytes(config, changed, batch_size).values())
            <= limit_bytes + (changed == parallel) * 1e15
        )

    return [name for name, value in changes.items() if fits(name, value)]


def my_layout():
    """A ParallelConfig for your model and cluster."""
    given = numbers("11.3")
    config, cluster = find_model(given["model"]).config, given_cluster(given["hardware"])
    limit_bytes = cluster.gpu.memory_bytes * Constants().memory_share
    gpus, batch_size, found = given["num_gpus"], given["batch_size"], []
    for tensor, pipeline, size in product((2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4)):
        data = max(1, gpus // tensor // pipeline)
        one = ParallelConfig(data, pipeline, tensor, size, sequence_parallel=True, zero_stage=1)
        for parallel in (one, replace(one, recompute="full")):
            if what_binds(config, parallel, gpus, batch_size, limit_bytes) == "nothing":
                seen = look_at(config, cluster, parallel, batch_size)
                found.append((seen.time.total_s, len(found), parallel))
    return min(found)[2]
