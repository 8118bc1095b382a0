"""What a hybrid layout refuses, before anything is sent: sizes that do not fit each other.

Chapter 11 shows the errors. Every rank comes to the same verdict from the same numbers, so none is
left waiting for another that has stopped. Production checks such things one by one where they are
used, and a rank that stops leaves the others to a timeout.
"""

from torch import nn

from slimlab.config import InputError, ModelConfig, require
from slimlab.model.transformer import Decoder
from slimlab.parallel.layout import SEQUENCE_PARALLEL, TENSOR_PARALLEL
from slimlab.parallel.mesh import MeshShape, check_mesh
from slimlab.parallel.tensor_checks import check_layout
from slimlab.plan.parallel_config import ParallelConfig, num_micro_batches
from slimlab.train.accumulate import map_tensors

RECOMPUTE = {"none": "none", "full": "block"}  # word of ParallelConfig -> word of the model


def check_hybrid(model: nn.Module, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that this model and so many ranks cannot have.

    model       the whole one
    parallel    the layout
    world_size  number of ranks

    Raises InputError that names the numbers and the nearest that would do.
    """
    require(
        isinstance(parallel, ParallelConfig),
        "a layout: slimlab.plan.parallel_config.ParallelConfig",
        f"a {type(parallel).__name__}",
        "give ParallelConfig(data=2, tensor=2), for instance",
    )
    shape = MeshShape(parallel.data, parallel.pipeline, parallel.tensor)
    check_mesh(shape, world_size)
    require(
        isinstance(model, Decoder) and not hasattr(model, "tensor_parallel"),
        "a whole Decoder",
        f"a {type(model).__name__}",
        'make one with build_model(ModelConfig(..., kind="decoder"))',
    )
    _check_stages(model.config, parallel)
    _check_tensor(model, parallel)
    require(
        parallel.recompute in RECOMPUTE,
        f"recompute: {' or '.join(RECOMPUTE)}",
        f"recompute = {parallel.recompute!r}",
        'the models of this book compute whole blocks again: recompute="full"',
    )


def _check_tensor(model: nn.Module, parallel: ParallelConfig) -> None:
    layout = SEQUENCE_PARALLEL if parallel.sequence_parallel else TENSOR_PARALLEL
    try:
        check_layout(model, layout, parallel.tensor, parallel.sequence_parallel)
    except InputError as error:
        # Rules are not the caller's here, and the group has a name.
        change = error.change.partition("; or leave the rule")[0]
        change = change.replace("take a group of ", "take tensor=")
        raise InputError(error.asked, error.given, change) from error


def _check_stages(config: ModelConfig, parallel: ParallelConfig) -> None:
    num_stages = parallel.pipeline * parallel.num_chunks
    require(
        parallel.num_chunks == 1 or parallel.pipeline > 1,
        "several chunks with two stages or more",
        f"num_chunks = {parallel.num_chunks}, pipeline = {parallel.pipeline}",
        "give num_chunks=1",
    )
    chunks = f" x num_chunks = {parallel.num_chunks}" if parallel.num_chunks > 1 else ""
    require(
        num_stages <= config.num_layers,
        "a layer for every stage at least",
        f"num_layers = {config.num_layers}, pipeline = {parallel.pipeline}{chunks}",
        f"give pipeline={max(1, config.num_layers // parallel.num_chunks)} at most, or a model of "
        f"{num_stages} layers",
    )
    require(
        parallel.pipeline == 1 or parallel.zero_stage <= 1,
        "zero_stage 0 or 1 with a pipeline",
        f"zero_stage = {parallel.zero_stage}, pipeline = {parallel.pipeline}",
        "give zero_stage=1: stages 2 and 3 would send gradients, or weights, once more for each "
        "micro-batch that passes through",
    )


def share_bounds(parallel: ParallelConfig, batch: object, replica: int) -> tuple[int, int]:
    """Return which sequences of a batch a replica has.

    parallel  the layout
    batch     the whole one, as in slimlab.train.accumulate
    replica   coordinate along the axis data
    returns   the first one's number, and the number behind the last

    Raises InputError with the nearest sizes if the batch does not divide among the replicas, and
    into their micro-batches.
    """
    sizes = []
    map_tensors(lambda tensor: sizes.append(tensor.shape[0] if tensor.dim() else None), batch)
    if not sizes or len(set(sizes)) != 1 or not sizes[0]:
        raise InputError(
            "a batch: tensors with the same number of sequences, at least one, as dim 0",
            f"{len(sizes)} tensors with dim 0 of {sorted(set(map(str, sizes)))}",
            "leave out of the batch what does not belong to single sequences",
        )
    size = num_micro_batches(parallel, sizes[0]) * parallel.micro_batch_size
    return replica * size, (replica + 1) * size
