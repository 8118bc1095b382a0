"""What a pipeline refuses, and how it cuts a batch; the squares of a stage's gradients.

Chapter 10 shows the errors. Every rank has the same arguments and the same batch, so each comes to
the same verdict by itself, before the first message. Only whether batches are the same takes a
call: each rank puts a digest of its own beside the loss.

Production trusts the program: stages that read different batches train on, and nobody sees it.
"""

import hashlib

import torch
from torch import Tensor

from slimlab.config import InputError, require
from slimlab.parallel.data import DataParallel
from slimlab.parallel.stages import Stage
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.pipeline_schedule import WEIGHT_GRADIENT, Schedule
from slimlab.train.accumulate import map_tensors, split_batch

TABLE = "embedding.tokens.weight"
DIGEST_BITS = 52  # of whole numbers that float64 has exactly


def check_stages(schedule: Schedule, world_size: int) -> None:
    """Refuse a schedule for another number of stages than there are ranks.

    schedule    what each stage does
    world_size  ranks of the pipeline

    Raises InputError.
    """
    require(
        schedule.num_stages == world_size,
        f"a schedule of {world_size} stages, one for each rank",
        f"{schedule.name} of {schedule.num_stages}",
        f"make the schedule for {world_size} stages, or start {schedule.num_stages} ranks",
    )


def check_recompute(schedule: Schedule, recompute: str) -> None:
    """Refuse recomputation where the backward pass is parted.

    schedule   what the stages do
    recompute  as in Decoder

    Raises InputError.
    """
    parted = any(parted_chunks(schedule, stage) for stage in range(schedule.num_stages))
    require(
        not parted or recompute == "none",
        'recompute = "none" where input and weight gradients are computed apart',
        f'recompute = "{recompute}" with the schedule {schedule.name}',
        "recomputation would have to happen twice: take 1f1b or interleaved",
    )


def check_replica(replica: DataParallel, stage: Stage) -> None:
    """Refuse what cannot add up the gradients of a stage over replicas of the pipeline.

    replica  DataParallel or Zero
    stage    whose gradients they are to be

    Raises InputError.
    """
    require(
        replica.model is stage,
        "a replica of this pipeline's stage",
        f"one of a {type(replica.model).__name__}",
        "make it with DataParallel(pipeline.stage, mesh.group('data'))",
    )
    zero = getattr(replica, "stage", 0)
    require(
        zero <= 1,
        "gradients that stay whole until a step ends: DataParallel, or Zero with stage=1",
        f"stage = {zero}",
        "take stage=1",
    )


def check_same_places(schedule: Schedule, before: Schedule) -> None:
    """Refuse a schedule that puts virtual stages elsewhere than they are.

    schedule  to follow from now on
    before    that the stages were cut for

    Raises InputError.
    """
    kept = ("num_stages", "num_chunks", "placement")
    now, then = ([getattr(one, name) for name in kept] for one in (before, schedule))
    require(
        now == then,
        f"a schedule of {now[0]} stages with {now[1]} chunks, placement {now[2]}",
        f"{then[0]} stages with {then[1]} chunks, placement {then[2]}",
        "make another pipeline of a whole model",
    )


def parted_chunks(schedule: Schedule, stage: int) -> frozenset[int]:
    """Find the chunks of a stage whose backward pass comes in two parts, at least once.

    schedule  what each stage does
    stage     which
    """
    order = schedule.stages[stage]
    return frozenset(one.chunk for one in order if one.kind == WEIGHT_GRADIENT)


def cut_batch(batch: object, num_micro_batches: int) -> list:
    """Cut a batch into so many micro-batches, of sizes that differ by one at most.

    batch              as in slimlab.train.accumulate
    num_micro_batches  m
    returns            pieces of the same form

    Raises InputError if there are fewer sequences than micro-batches, or tensors of the batch
    disagree about their number.
    """
    split_batch(batch, None)  # refuses what is no batch
    sizes = []
    map_tensors(lambda tensor: sizes.append(len(tensor)), batch)
    require(
        sizes[0] >= num_micro_batches,
        f"at least one sequence for each of {num_micro_batches} micro-batches",
        f"a batch of {sizes[0]}",
        f"make the schedule for at most {sizes[0]} micro-batches, or give a batch of "
        f"{num_micro_batches} sequences",
    )
    pieces, start = [], 0
    for size in shard_sizes(sizes[0], num_micro_batches):
        here = slice(start, start + size)
        pieces.append(map_tensors(lambda tensor, here=here: tensor[here], batch))
        start += size
    return pieces


def digest_of(batch: object) -> int:
    """Return a number that stands for the contents of a batch.

    batch  as in slimlab.train.accumulate
    """
    digest = hashlib.sha256()
    map_tensors(lambda one: digest.update(one.cpu().contiguous().numpy().tobytes()), batch)
    return int.from_bytes(digest.digest()[:8]) >> (64 - DIGEST_BITS)


def check_digests(found: list[float]) -> None:
    """Refuse a step whose stages have read different batches.

    found  the digest of each stage, the same list on every rank

    Raises InputError that names the stages.
    """
    odd = [str(rank) for rank, one in enumerate(found) if one != found[0]]
    if odd:
        raise InputError(
            "the same batch on every stage of a pipeline",
            f"another on stage {', '.join(odd)} than on stage 0",
            "cut the data over the axis data alone. No weight was changed",
        )


def own_square(stage: Stage) -> Tensor:
    """Add up the squares of a stage's gradients so that the ranks' sums are those of the model.

    stage    whose gradients are there
    returns  (1,) in float64: a tied table counts on the first stage, what is replicated over a
             tensor group on its first rank, a copy of key heads by its share
    """
    done = getattr(stage, "tensor_parallel", None)
    total = torch.zeros(1, dtype=torch.float64)
    for name, param in stage.named_parameters():
        elsewhere = stage.tied and name == TABLE and 0 not in stage.virtual_stages
        if done is not None and done.cut_dims[name] is None and done.group.rank:
            elsewhere = True
        if param.grad is None or elsewhere:
            continue
        square = torch.linalg.vector_norm(param.grad, dtype=torch.float64).cpu() ** 2
        total += square / (done.num_copies if done and name in done.copied else 1)
    return total
