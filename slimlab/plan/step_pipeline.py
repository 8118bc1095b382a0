"""A planned layout as the times of its virtual stages, to be simulated and drawn.

slimlab.plan.step_time has a closed form of a step; a simulation of the same times shows where each
stage waits, and how good the closed form is. Chapter 11 draws it.
"""

from slimlab.config import ModelConfig
from slimlab.plan.block_time import PartTime, block_time, logits_time, tables_time
from slimlab.plan.hardware import Cluster, Constants
from slimlab.plan.parallel_config import ParallelConfig, check_parallel, stage_layers
from slimlab.plan.rank_clock import Clock
from slimlab.plan.software import Software
from slimlab.plan.stage_times import StageTimes
from slimlab.plan.step_time import exchange_s


def planned_stage_times(
    config: ModelConfig,
    cluster: Cluster,
    parallel: ParallelConfig,
    batch_size: int,
    *,
    software: Software | None = None,
    constants: Constants | None = None,
) -> StageTimes:
    """Predict the seconds of each virtual stage for one micro-batch.

    config, cluster, parallel, batch_size, software, constants  as in step_time
    returns  times of pipeline x num_chunks virtual stages in the order of the model, with tables in
             the first and logits in the last; what is computed again counts as part of the input
             gradient; a message blocks both stages

    Raises InputError for a layout that cannot be.
    """
    check_parallel(config, parallel, batch_size)
    clock = Clock(cluster, parallel, software or Software(), constants or Constants())
    block, parts = block_time(config, clock), []
    for number in _virtual_layers(config, parallel):
        parts.append([(number, block)])
    parts[0].append((1, tables_time(config, clock)))
    parts[-1].append((1, logits_time(config, clock)))
    return StageTimes(
        forward_s=tuple(_sum(part, "forward_s") for part in parts),
        input_gradient_s=tuple(
            _sum(part, "backward_s") + _sum(part, "recompute_s") - _sum(part, "weight_gradient_s")
            for part in parts
        ),
        weight_gradient_s=tuple(_sum(part, "weight_gradient_s") for part in parts),
        message_s=exchange_s(config, clock),
        messages="block",
    )


def _virtual_layers(config: ModelConfig, parallel: ParallelConfig) -> list[int]:
    layers = stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)
    count = parallel.pipeline * parallel.num_chunks
    # Layers that do not divide leave one out at each end.
    short = sum(layers) % count != 0
    each = (sum(layers) + 2 * short) // count
    return [each - (short and place in (0, count - 1)) for place in range(count)]


def _sum(parts: list[tuple[int, PartTime]], name: str) -> float:
    return sum(number * getattr(part, name) for number, part in parts)
