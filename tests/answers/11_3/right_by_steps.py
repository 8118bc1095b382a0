from dataclasses import replace

from slimlab.classroom.check import numbers
from slimlab.plan.hardware import find_cluster
from slimlab.plan.known_models import find_model
from slimlab.plan.layout_memory import rank_bytes
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.planner import look_at


def given_cluster(hardware):
    """The cluster of part 3: hosts of 4 GPUs, half the network."""
    cluster = find_cluster(hardware)
    return replace(cluster, gpus_per_host=4, network_bytes_per_s=cluster.network_bytes_per_s / 2)


def what_binds(config, parallel, num_gpus, batch_size, limit_bytes):
    at_once = parallel.data * parallel.micro_batch_size
    if parallel.data * parallel.pipeline * parallel.tensor != num_gpus:
        return "gpus"
    if config.num_heads % parallel.tensor or config.d_ff % parallel.tensor:
        return "heads"
    if config.num_layers / parallel.pipeline != config.num_layers // parallel.pipeline:
        return "layers"
    if batch_size // at_once * at_once != batch_size:
        return "batch"
    items = dict(rank_bytes(config, parallel, batch_size))
    state = items.pop("weights") + items.pop("gradients") + items.pop("optimizer")
    if state > limit_bytes:
        return "state"
    return "activations" if state + sum(items.values()) > limit_bytes else "nothing"


def what_helps(config, parallel, batch_size, limit_bytes):
    helps = []
    for name, changed in (
        ("micro_batch_size", replace(parallel, micro_batch_size=1)),
        ("recompute", replace(parallel, recompute="full")),
        ("sequence_parallel", replace(parallel, sequence_parallel=True)),
        ("zero_stage", replace(parallel, zero_stage=1)),
    ):
        if changed == parallel:
            continue
        if sum(rank_bytes(config, changed, batch_size).values()) <= limit_bytes:
            helps.append(name)
    return helps


def my_layout():
    """Tensor groups of 2 or 4; the fewest stages that fit, or twice as many."""
    given = numbers("11.3")
    config, cluster = find_model(given["model"]).config, given_cluster(given["hardware"])
    best = None
    for tensor in (2, 4):
        pipeline, fitting = 1, 0
        while fitting < 3 and tensor * pipeline <= given["num_gpus"]:
            data = given["num_gpus"] // (tensor * pipeline)
            for size in (1, 2):
                parallel = ParallelConfig(
                    data, pipeline, tensor, size, sequence_parallel=True, zero_stage=1
                )
                if config.num_layers % pipeline:
                    continue
                seen = look_at(config, cluster, parallel, given["batch_size"])
                if seen.memory_bytes <= 0.95 * cluster.gpu.memory_bytes:
                    fitting += 1
                    if best is None or seen.time.total_s < best[0]:
                        best = seen.time.total_s, parallel
            pipeline *= 2
    return best[1]
