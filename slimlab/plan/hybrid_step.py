"""A step on a mesh, predicted: what each rank holds, and the payload that it brings to each axis.

The demo hybrid compares it with what the tensors and the ledgers say; chapter 11 may too. The axes
do not mix: along tensor go activations of this rank's layers, along pipeline the stream between
stages, along data the gradients of this rank's part of the model, and with ZeRO its new weights.

Production plans in the same way, and adds what libraries pad and fuse (slimlab.plan.layout_bytes
has those). Shoeybi et al. 2019 (arXiv:1909.08053); Narayanan et al. 2021 (arXiv:2104.04473).
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from math import prod

from slimlab.config import ModelConfig, require
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.pipeline_messages import predict_step as predict_messages
from slimlab.plan.pipeline_schedule import Schedule
from slimlab.plan.tensor_parallel import local_param_shapes
from slimlab.plan.zero_units import shard_size

NUMBER_BYTES = 8
TABLE = "embedding.tokens.weight"


def stage_shapes(
    config: ModelConfig, tensor: int, schedule: Schedule, layers: Sequence[int], stage: int
) -> dict[str, tuple[int, ...]]:
    """Write down what a rank holds of a model whose layers and whose stack of layers are cut.

    config    of a decoder
    tensor    ranks that share each layer
    schedule  says which virtual stage is on which stage
    layers    blocks of each virtual stage
    stage     of the rank
    returns   name -> shape, for every parameter

    Raises InputError as local_param_shapes does.
    """
    ends, last = list(accumulate(layers)), schedule.num_virtual_stages - 1
    found = {}
    for name, shape in local_param_shapes(config, tensor).items():
        top, number, *_ = name.split(".")
        if top == "blocks":
            places = [next(place for place, end in enumerate(ends) if int(number) < end)]
        else:
            places = [0 if top == "embedding" else last]
        if name == TABLE and config.tie_embeddings:
            places.append(last)
        if any(schedule.place_of(place)[0] == stage for place in places):
            found[name] = shape
    return found


def hybrid_held_bytes(
    shapes: dict[str, tuple[int, ...]], parallel: ParallelConfig, replica: int, item_bytes: int
) -> dict[str, int]:
    """Predict the bytes of weights, gradients and AdamW's averages on a rank, between steps.

    shapes      as stage_shapes returned them
    parallel    data and zero_stage, 0 or 1, are read
    replica     coordinate of the rank along data
    item_bytes  of an element
    returns     "weights", "gradients" and "optimizer"

    Raises InputError for stages 2 and 3, which slimlab.plan.zero predicts.
    """
    _check_stage(parallel)
    if not parallel.zero_stage:
        own = sum(map(prod, shapes.values())) * item_bytes
        return {"weights": own, "gradients": own, "optimizer": 2 * own}
    whole = shard = 0
    for size in _rows(shapes):
        part = shard_size(size, parallel.data)
        whole += part * parallel.data
        shard += min(max(size - replica * part, 0), part)
    return {
        "weights": whole * item_bytes,
        "gradients": whole * item_bytes,
        "optimizer": 2 * shard * item_bytes,
    }


def hybrid_step_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    schedule: Schedule,
    layers: Sequence[int],
    stage: int,
    item_bytes: int,
) -> dict[str, int]:
    """Predict the payload of a rank's calls in a step, gradients and update, along each axis.

    config      of a decoder with a key head for every rank of a tensor group at least
    parallel    the layout, without sequence parallelism, with zero_stage 0 or 1
    schedule    of the stages, with the micro-batches of a step
    layers      blocks of each virtual stage
    stage       of the rank
    item_bytes  of an element
    returns     axis -> bytes as the ledger counts them, 0 along an axis of one rank; "all": what
                all ranks tell each other

    Raises InputError for layouts that are not written down here.
    """
    _check_stage(parallel)
    require(
        not parallel.sequence_parallel and config.num_kv_heads >= parallel.tensor,
        "a layout without sequence parallelism and without copies of key heads",
        f"{parallel}, num_kv_heads = {config.num_kv_heads}",
        "see slimlab.plan.tensor_parallel, which predicts both",
    )
    shapes = stage_shapes(config, parallel.tensor, schedule, layers, stage)
    found = dict.fromkeys(("data", "pipeline", "tensor"), 0) | {"all": NUMBER_BYTES}
    if parallel.data > 1:
        found["data"] = _data_bytes(shapes, parallel, item_bytes)
    sizes = [parallel.micro_batch_size] * schedule.num_micro_batches
    if parallel.pipeline > 1:
        table = prod(shapes.get(TABLE, (0,))) * item_bytes if config.tie_embeddings else 0
        axes = (config.seq_len, config.d_model, item_bytes)
        one = predict_messages(schedule, sizes, *axes, table_bytes=table)[stage]
        received = sum(n_bytes for _, n_bytes in one.received)
        found["pipeline"] = one.sent_bytes + received + sum(one.all_reduces)
    if parallel.tensor > 1:
        positions = sum(sizes) * config.seq_len
        numbers = _tensor_numbers(config, schedule, layers, stage)
        found["tensor"] = positions * numbers * item_bytes
    return found


def _data_bytes(shapes: dict[str, tuple[int, ...]], parallel: ParallelConfig, item_bytes: int):
    report = (2 + len(shapes) + parallel.data) * NUMBER_BYTES
    if not parallel.zero_stage:
        return sum(map(prod, shapes.values())) * item_bytes + report
    parts = sum(shard_size(size, parallel.data) for size in _rows(shapes))
    return parts * (parallel.data + 1) * item_bytes + report


def _rows(shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Add up the elements of each unit: the tables, each block, what stands behind the last."""
    sizes = defaultdict(int)
    for name, shape in shapes.items():
        top, number, *_ = name.split(".")
        unit = f"{top}.{number}" if top == "blocks" else top == "embedding"
        sizes[unit] += prod(shape)
    return list(sizes.values())


def _tensor_numbers(
    config: ModelConfig, schedule: Schedule, layers: Sequence[int], stage: int
) -> int:
    """Count the numbers for each position that a rank brings to its tensor group."""
    mine = [n for n in range(len(layers)) if schedule.place_of(n)[0] == stage]
    first, last = 0 in mine, len(layers) - 1 in mine
    # Each block: two sums forward, two backward. The embedding's sum forward, the head's backward,
    # and two numbers of the loss.
    streams = 4 * sum(layers[place] for place in mine) + first + last
    return streams * config.d_model + 2 * last


def _check_stage(parallel: ParallelConfig) -> None:
    require(
        parallel.zero_stage <= 1,
        "zero_stage 0 or 1",
        f"zero_stage = {parallel.zero_stage}",
        "see slimlab.plan.zero, which predicts the stages 2 and 3",
    )
