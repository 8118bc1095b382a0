"""One configuration for all axes of a parallel training run, and what makes it legal.

The planner (slimlab.plan.planner) makes many of these and keeps the best. Chapter 11 writes them by
hand first.

Production has further axes: context (long sequences) and experts.
"""

from dataclasses import dataclass
from functools import lru_cache

from slimlab.config import InputError, ModelConfig, check_choice, check_size, require
from slimlab.plan.params import check_config

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "gpipe")
ZERO_STAGES = (0, 1, 2, 3)
INNER_AXES = ("data", "pipeline")
# Megatron-LM's --make-vocab-size-divisible-by
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class ParallelConfig:
    """How a training run is laid out over its ranks.

    data, pipeline, tensor  ranks along each axis: replicas, stages, ranks that share each layer;
                            their product is the number of GPUs
    micro_batch_size   sequences that pass through a replica's stages together
    num_chunks         pieces of the model on each stage; more than 1 is the interleaved schedule
    schedule           "1f1b" or "gpipe"
    recompute          "none"; "selective": scores and what follows them up to the weighted average;
                       "full": each block whole (recompute="block" of TrainingConfig)
    sequence_parallel  between sharded layers, the ranks of a tensor group hold a part of the
                       positions each
    zero_stage         0 to 3: replicas share nothing, the optimizer's state, gradients too, weights
                       too
    inner_axis         the axis whose neighbours stand next to a tensor group: "data" as in
                       Megatron-LM, or "pipeline"; it matters where tensor groups are smaller than a
                       host

    Raises InputError for sizes that are not positive whole numbers and for unknown words.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    micro_batch_size: int = 1
    num_chunks: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    sequence_parallel: bool = False
    zero_stage: int = 0
    inner_axis: str = "data"

    def __post_init__(self):
        for name in ("data", "pipeline", "tensor", "micro_batch_size", "num_chunks"):
            check_size(name, getattr(self, name))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("recompute", self.recompute, RECOMPUTE)
        check_choice("inner_axis", self.inner_axis, INNER_AXES)
        given, change = f"zero_stage = {self.zero_stage!r}", "choose one of these"
        known = self.zero_stage in ZERO_STAGES and not isinstance(self.zero_stage, bool)
        require(known, "zero_stage: 0, 1, 2 or 3", given, change)
        asked = "sequence_parallel, True or False"
        given, change = f"sequence_parallel = {self.sequence_parallel!r}", "choose one"
        require(isinstance(self.sequence_parallel, bool), asked, given, change)

    @property
    def world_size(self) -> int:
        """The GPUs that it needs."""
        return self.data * self.pipeline * self.tensor

    def ranks_per_host(self, axis: str, gpus_per_host: int) -> int:
        """Count how many ranks of a group along an axis share a host.

        axis           "tensor", "data" or "pipeline"
        gpus_per_host  ranks fill one host after the other

        Raises InputError for another axis.
        """
        check_choice("axis", axis, ("tensor", "data", "pipeline"))
        outer = "pipeline" if self.inner_axis == "data" else "data"
        stride = 1
        for name in ("tensor", self.inner_axis, outer):
            if name == axis:
                break
            stride *= getattr(self, name)
        return min(getattr(self, axis), max(1, gpus_per_host // stride))

    def __str__(self):
        words = [f"tensor {self.tensor}, pipeline {self.pipeline}, data {self.data}"]
        words += [f"micro-batch {self.micro_batch_size}"]
        words += [f"{self.num_chunks} chunks"] if self.num_chunks > 1 else []
        words += [self.schedule] if self.schedule != "1f1b" else []
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        words += ["sequence parallel"] if self.sequence_parallel else []
        words += [f"ZeRO {self.zero_stage}"] if self.zero_stage else []
        return ", ".join(words)


def stage_layers(num_layers: int, num_stages: int, num_chunks: int = 1) -> tuple[int, ...]:
    """Divide layers among stages: evenly, or with one less on the first and on the last.

    The tables of tokens before the first layer, and the logits behind the last, then count as a
    layer each, as in BLOOM (70 layers on 12 stages) and Llama 3 (126 on 16).

    num_layers  of the model
    num_stages  p
    num_chunks  of each stage; all have the same number of layers but the first and the last
    returns     layers of each stage

    Raises InputError with the nearest numbers of stages that work.
    """
    if _divides(num_layers, num_stages, num_chunks):
        return (num_layers // num_stages,) * num_stages
    if num_stages > 1 and _divides(num_layers + 2, num_stages, num_chunks):
        each = (num_layers + 2) // num_stages
        if each > 1:
            return (each - 1, *[each] * (num_stages - 2), each - 1)
    fitting = [p for p in range(1, num_layers + 1) if _fits(num_layers, p, num_chunks)]
    below = [str(p) for p in fitting if p < num_stages][-2:]
    above = [str(p) for p in fitting if p > num_stages][:2]
    raise InputError(
        "layers that divide among stages and chunks, with or without a layer less on both ends",
        f"{num_layers} layers, {num_stages} stages of {num_chunks} chunks",
        f"choose pipeline from {', '.join([*below, *above]) or 'nothing'}, or change num_chunks",
    )


@lru_cache(maxsize=1024)
def legal_chunks(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """List the numbers of chunks into which stages can be cut.

    num_layers  of the model
    num_stages  p, a number that stage_layers accepts
    returns     1 and more for several stages, 1 for one
    """
    most = -(-num_layers // num_stages) + 1 if num_stages > 1 else 1
    return tuple(v for v in range(1, most + 1) if _fits(num_layers, num_stages, v))


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Return the rows of a table of tokens that is shared by ranks in equal parts.

    vocab_size  V
    tensor      ranks that share it
    returns     V, rounded up to a multiple of 128 times the number of ranks, as Megatron-LM does
    """
    multiple = VOCABULARY_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def num_micro_batches(parallel: ParallelConfig, batch_size: int) -> int:
    """Return how many micro-batches each replica works through in a step.

    parallel    data and micro_batch_size are read
    batch_size  sequences of a step, over all replicas

    Raises InputError with the nearest batch sizes if the batch does not divide.
    """
    check_size("batch_size", batch_size)
    at_once = parallel.data * parallel.micro_batch_size
    low = batch_size // at_once * at_once
    near = [str(size) for size in (low, low + at_once) if size]
    require(
        batch_size % at_once == 0,
        "a batch that divides among replicas and into micro-batches",
        f"batch_size = {batch_size}, data = {parallel.data}, "
        f"micro_batch_size = {parallel.micro_batch_size}",
        f"choose batch_size from {', '.join(near)}, or a smaller micro_batch_size",
    )
    return batch_size // at_once


def check_parallel(
    config: ModelConfig, parallel: ParallelConfig, batch_size: int, num_gpus: int | None = None
) -> None:
    """Refuse a layout that cannot be: say which sizes do not divide, and the nearest that do.

    config      a decoder; its sizes are read
    parallel    the layout
    batch_size  sequences of a step
    num_gpus    that the axes must multiply to; not looked at if None

    Raises InputError.
    """
    check_config(config)
    require(
        config.kind == "decoder",
        'a decoder (kind="decoder")',
        f"kind = {config.kind!r}",
        "plan each half of an encoder-decoder as a model of its own",
    )
    if num_gpus is not None:
        _check_product(parallel, num_gpus)
    _check_tensor(config, parallel)
    stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)
    _check_chunks(parallel, num_micro_batches(parallel, batch_size))


def _check_product(parallel: ParallelConfig, num_gpus: int) -> None:
    check_size("num_gpus", num_gpus)
    inner = parallel.tensor * parallel.pipeline
    nearest = max(1, num_gpus // inner)
    require(
        parallel.world_size == num_gpus,
        f"axes that multiply to {num_gpus} GPUs",
        f"data {parallel.data} x pipeline {parallel.pipeline} x tensor {parallel.tensor} = "
        f"{parallel.world_size}",
        f"give data={nearest}, for {nearest * inner} GPUs",
    )


def _check_tensor(config: ModelConfig, parallel: ParallelConfig) -> None:
    if not _shares(config, parallel.tensor):
        fitting = [t for t in range(1, config.num_heads + 1) if _shares(config, t)]
        near = sorted(fitting, key=lambda t: abs(t - parallel.tensor))[:3]
        require(
            False,
            "whole heads and equal parts of the feed-forward layer for every rank",
            f"tensor = {parallel.tensor}, num_heads = {config.num_heads}, "
            f"num_kv_heads = {config.num_kv_heads}, d_ff = {config.d_ff}",
            f"choose tensor from {', '.join(map(str, sorted(near)))}",
        )
    require(
        not parallel.sequence_parallel or config.seq_len % parallel.tensor == 0,
        "positions that divide among the ranks of a tensor group (sequence_parallel)",
        f"seq_len = {config.seq_len}, tensor = {parallel.tensor}",
        "leave sequence_parallel out, or change seq_len",
    )


def _shares(config: ModelConfig, tensor: int) -> bool:
    # Fewer key and value heads than ranks: some ranks hold copies of one head.
    kv = config.num_kv_heads
    whole = kv % tensor == 0 or tensor % kv == 0
    return whole and config.num_heads % tensor == 0 and config.d_ff % tensor == 0


def _check_chunks(parallel: ParallelConfig, count: int) -> None:
    if parallel.num_chunks == 1:
        return
    p = parallel.pipeline
    require(
        p > 1 and parallel.schedule == "1f1b",
        "several chunks with two stages or more, and the schedule 1f1b",
        f"num_chunks = {parallel.num_chunks}, pipeline = {p}, schedule = {parallel.schedule!r}",
        "give num_chunks=1",
    )
    low = count // p * p
    near = " or ".join(str(size) for size in (low, low + p) if size)
    require(
        count % p == 0,
        "micro-batches in multiples of the stages, for more than one chunk",
        f"{count} micro-batches, {p} stages",
        f"give num_chunks=1, or a batch of {near} micro-batches",
    )


def _divides(num_layers: int, num_stages: int, num_chunks: int) -> bool:
    return num_layers % (num_stages * num_chunks) == 0


def _fits(num_layers: int, num_stages: int, num_chunks: int) -> bool:
    if _divides(num_layers, num_stages, num_chunks):
        return True
    ends = num_stages > 1 and num_layers + 2 > num_stages
    return ends and _divides(num_layers + 2, num_stages, num_chunks)
