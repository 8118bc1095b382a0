"""Seconds of a training step for a model, a cluster and a layout, part by part.

A pipeline takes m times its slowest stage, and once the time of all others: the bubble. To it come
messages between stages, the sum of gradients over replicas, and the optimizer. The last stage has
the logits besides its layers, so it is the slowest where layers divide evenly. Chapter 11 holds
the model to published runs, and reads off it what each axis costs.

Narayanan et al. 2021 (arXiv:2104.04473), sections 2 and 3. What the model leaves out: stragglers,
other jobs on the network, processors that prepare data, restarts; programs that are less well
tuned than those it was fitted on are slower.
"""

from dataclasses import dataclass
from math import ceil

from slimlab.config import ModelConfig
from slimlab.plan.block_time import PartTime, block_time, logits_time, tables_time
from slimlab.plan.flops import SECONDS_PER_DAY
from slimlab.plan.hardware import Cluster, Constants
from slimlab.plan.layout_bytes import Transfer, message_bytes, step_transfers, tied_table_bytes
from slimlab.plan.layout_memory import fullest_params
from slimlab.plan.parallel_config import (
    ParallelConfig,
    check_parallel,
    num_micro_batches,
    stage_layers,
)
from slimlab.plan.rank_clock import Clock
from slimlab.plan.software import Software
from slimlab.plan.training_flop import training_step_flop


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, which add up to total_s; rates follow from them.

    compute_s    of the slowest stage, all micro-batches, tensor_s left out
    tensor_s     in it: collectives of the tensor group that nothing hides
    message_s    between stages, on the slowest stage
    bubble_s     in which the slowest stage waits for the others to begin and to end
    data_s       sums of gradients, and with ZeRO gathered weights, that nothing hides
    optimizer_s  of the update
    model_flop   of the step: forward and backward, nothing twice
    batch_tokens of the step, over all replicas
    num_gpus     that share it
    peak_flop_per_s  of one
    recomputing_flop  of the step if each block's forward pass is counted twice
    """

    compute_s: float
    tensor_s: float
    message_s: float
    bubble_s: float
    data_s: float
    optimizer_s: float
    model_flop: float
    batch_tokens: int
    num_gpus: int
    peak_flop_per_s: float
    recomputing_flop: float

    @property
    def total_s(self) -> float:
        """The step."""
        parts = (self.compute_s, self.tensor_s, self.message_s, self.bubble_s)
        return sum(parts) + self.data_s + self.optimizer_s

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation: the model's own work over what the peaks allow."""
        return self.model_flop / (self.total_s * self.num_gpus * self.peak_flop_per_s)

    @property
    def model_flop_per_s_per_gpu(self) -> float:
        """The model's own work, per second and GPU."""
        return self.model_flop / (self.total_s * self.num_gpus)

    @property
    def recomputing_flop_per_s_per_gpu(self) -> float:
        """Work with each block's forward pass twice, per second and GPU, done or not.

        Narayanan et al. 2021, equation 3, and most runs after it state this rate.
        """
        return self.recomputing_flop / (self.total_s * self.num_gpus)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, on all GPUs together."""
        return self.batch_tokens / self.total_s

    def days(self, num_tokens: float) -> float:
        """Return how long a run takes if nothing interrupts it.

        num_tokens  that it passes over
        """
        return num_tokens / self.tokens_per_s / SECONDS_PER_DAY


def step_time(
    config: ModelConfig,
    cluster: Cluster,
    parallel: ParallelConfig,
    batch_size: int,
    *,
    software: Software | None = None,
    constants: Constants | None = None,
) -> StepTime:
    """Predict the seconds of a training step with AdamW.

    config      a decoder; its seq_len is that of the batch
    cluster     of which GPUs
    parallel    the layout
    batch_size  sequences of a step, over all replicas
    software    what the program does to save time, Software() if not given
    constants   Constants() if not given
    returns     seconds part by part

    Raises InputError for a layout that cannot be. Whether it fits the memory is not looked at:
    slimlab.plan.layout_memory tells.
    """
    check_parallel(config, parallel, batch_size)
    clock = Clock(cluster, parallel, software or Software(), constants or Constants())
    count = num_micro_batches(parallel, batch_size)
    first, middle, last = stages = _stage_times(config, clock)
    slow = max(stages, key=lambda part: part.total_s)
    message_s = exchange_s(config, clock)
    all_s = first.total_s + last.total_s + (parallel.pipeline - 2) * middle.total_s
    others_s = all_s - slow.total_s if parallel.pipeline > 1 else 0.0
    hops = 2 * (parallel.pipeline - 1)
    bubble_s = others_s / parallel.num_chunks + hops * message_s
    data_s = _data_s(config, clock, batch_size, stages, count) + _tied_s(config, clock)
    flop = {
        recompute: training_step_flop(config, batch_size, recompute=recompute)
        for recompute in ("none", "block")
    }
    return StepTime(
        compute_s=count * (slow.total_s - slow.tensor_s),
        tensor_s=count * slow.tensor_s,
        message_s=2 * count * parallel.num_chunks * message_s,
        bubble_s=bubble_s,
        data_s=data_s,
        optimizer_s=_optimizer_s(config, clock),
        model_flop=flop["none"],
        batch_tokens=batch_size * config.seq_len,
        num_gpus=parallel.world_size,
        peak_flop_per_s=cluster.gpu.peak_flop_per_s,
        recomputing_flop=flop["block"],
    )


def _stage_times(config: ModelConfig, clock: Clock) -> tuple[PartTime, PartTime, PartTime]:
    """Seconds of the first stage, of one between and of the last for one micro-batch, no messages.

    With one stage all three are that stage; with two there is none between.
    """
    parallel = clock.parallel
    layers = stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)
    block = block_time(config, clock)
    tables, logits = tables_time(config, clock), logits_time(config, clock)
    if parallel.pipeline == 1:
        return (_joined([(layers[0], block), (1, tables), (1, logits)]),) * 3
    first, last = [(layers[0], block), (1, tables)], [(layers[-1], block), (1, logits)]
    middle = [(layers[1] if parallel.pipeline > 2 else 0, block)]
    return _joined(first), _joined(middle), _joined(last)


def _joined(parts: list[tuple[int, PartTime]]) -> PartTime:
    names = ("forward_s", "backward_s", "recompute_s", "weight_gradient_s", "tensor_s")
    return PartTime(*(sum(n * getattr(part, name) for n, part in parts) for name in names))


def exchange_s(config: ModelConfig, clock: Clock) -> float:
    """Predict the seconds of an exchange between neighbouring stages: one message each way.

    config  d_model and seq_len are read
    clock   what seconds are computed from
    """
    parallel, cluster = clock.parallel, clock.cluster
    if parallel.pipeline == 1:
        return 0.0
    n_bytes = message_bytes(config, parallel, clock.software)
    parts = clock.software.split_messages or parallel.sequence_parallel
    near = parallel.ranks_per_host("pipeline", cluster.gpus_per_host) == parallel.pipeline
    rate = cluster.host_bytes_per_s if near else cluster.network_bytes_per_s
    sent = n_bytes / (parallel.tensor if parts else 1)
    seconds = clock.constants.message_s + sent / (rate * clock.constants.network_efficiency)
    seconds *= 1 if clock.software.paired_messages else 2
    if parts and not parallel.sequence_parallel:
        seconds += clock.collective_s("all_gather", "tensor", n_bytes)
    return seconds


def _tied_s(config: ModelConfig, clock: Clock) -> float:
    """Seconds of the sum of a tied table's gradients over the first and the last stage."""
    n_bytes = tied_table_bytes(config, clock.parallel, clock.software)
    if not n_bytes:
        return 0.0
    rate = clock.cluster.network_bytes_per_s * clock.constants.network_efficiency
    return clock.constants.message_s + n_bytes / rate  # a ring of two sends each byte once


def _data_s(
    config: ModelConfig, clock: Clock, batch_size: int, stages: tuple[PartTime, ...], count: int
) -> float:
    """Seconds of what replicas exchange, on the stage where it takes longest, less what is hidden.

    From zero_stage 2 on each micro-batch exchanges. Weights are gathered beside the block before,
    gradients are summed beside the backward pass, which hides at most as long as it lasts.
    """
    longest, _ = fullest_params(config, clock.parallel)
    transfers = step_transfers(config, clock.parallel, batch_size, clock.software, stage=longest)
    part = stages[{0: 0, clock.parallel.pipeline - 1: 2}.get(longest, 1)]
    there_s = back_s = once_s = 0.0
    for one in transfers:
        if one.axis != "data":
            continue
        seconds = _calls_s(clock, one)
        if clock.parallel.zero_stage == 3 and one.name == "all_gather":
            there_s, back_s = there_s + seconds / 2, back_s + seconds / 2
        elif one.purpose == "weights":
            once_s += seconds
        else:
            back_s += seconds
    # Without accumulation in shards only the last micro-batch's backward pass hides anything.
    times = count if clock.parallel.zero_stage >= 2 else 1
    if clock.software.overlap_data:
        there_s = max(0.0, there_s - times * part.forward_s)
        back_s = max(0.0, back_s - times * (part.backward_s + part.recompute_s))
    return there_s + back_s + once_s


def _calls_s(clock: Clock, transfer: Transfer) -> float:
    return transfer.calls * clock.collective_s(transfer.name, "data", transfer.n_bytes)


def _optimizer_s(config: ModelConfig, clock: Clock) -> float:
    parallel = clock.parallel
    count = fullest_params(config, parallel)[1]
    shards = parallel.data if parallel.zero_stage else 1
    return clock.memory_s(ceil(count / shards) * clock.software.update_bytes)
