"""The axis pipeline of a hybrid run: its schedule, who has which parameter, and evaluation.

Chapter 11 uses it through slimlab.parallel.hybrid. Training fills the stages with micro-batches;
evaluation sends one batch after the other through them, and idles as the naive schedule does.
Production evaluates with the forward half of its schedule.
"""

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import require
from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.pipeline_passes import ChunkPass
from slimlab.parallel.schedules_zero_bubble import make_schedule
from slimlab.parallel.stages import stage_of
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.pipeline_schedule import Schedule
from slimlab.train.accumulate import Objective


def schedule_for(parallel: ParallelConfig, num_micro_batches: int) -> Schedule:
    """Make the schedule of a layout.

    parallel           its pipeline, schedule and num_chunks are read
    num_micro_batches  of a step

    Raises InputError as make_schedule does.
    """
    name = "interleaved" if parallel.num_chunks > 1 else parallel.schedule
    chunks = parallel.num_chunks if parallel.num_chunks > 1 else None
    return make_schedule(name, parallel.pipeline, num_micro_batches, chunks)


def take_micro_batches(pipeline: Pipeline, parallel: ParallelConfig, num: int) -> None:
    """Let a pipeline's schedule be that of another number of micro-batches.

    pipeline  changed in place
    parallel  the layout
    num       micro-batches of each step from now on
    """
    if pipeline.schedule.num_micro_batches != num:
        pipeline.follow(schedule_for(parallel, num))


def owners_of(model: nn.Module, schedule: Schedule) -> dict[str, int]:
    """Tell which stage answers for each parameter: of a tied table the first.

    model     a whole decoder
    schedule  says which layers are where
    returns   name of the parameter -> stage
    """
    owners = {}
    for stage in reversed(range(schedule.num_stages)):
        part = stage_of(model, schedule, stage)
        owners |= {name: stage for name, _ in part.named_parameters()}
    return owners


def check_stages_train(model: nn.Module, schedule: Schedule) -> None:
    """Refuse a model that has nothing to train on some stage.

    model     a whole decoder
    schedule  says which layers are where

    Raises InputError, on every rank alike, that names the stages.
    """
    stages = range(schedule.num_stages)
    parts = [stage_of(model, schedule, stage).parameters() for stage in stages]
    idle = [s for s in stages if not any(param.requires_grad for param in parts[s])]
    require(
        not idle,
        "parameters that require a gradient on every stage",
        f"{schedule.num_stages} stages, none on stage {', '.join(map(str, idle))}",
        "unfreeze some, param.requires_grad_(True), or give pipeline=1 and more data or tensor",
    )


def from_owners(
    group: Communicator,
    owners: dict[str, int],
    shapes: dict[str, torch.Size],
    named: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Bring what the stages have to every rank of the pipeline.

    group   of the stages
    owners  as owners_of returned them
    shapes  of the whole parameters, by name in the order of the whole model
    named   name -> whole tensor, of this stage's parameters
    returns name -> tensor of all stages' parameters, the same on every stage

    Communicates: one broadcast over the stages for each parameter.
    """
    like, found = next(iter(named.values())), {}
    for name, shape in shapes.items():
        mine = owners[name] == group.rank
        tensor = named[name].contiguous() if mine else like.new_empty(shape)
        found[name] = group.broadcast(tensor, owners[name])
    return found


@torch.no_grad()
def evaluate_stages(pipeline: Pipeline, batch: object, objective: Objective) -> tuple[float, int]:
    """Compute the loss of a batch, without gradients, on all stages together.

    pipeline   of this rank
    batch      the same on every stage
    objective  as in Pipeline.gradients
    returns    the sum of losses in nats and the number of target tokens, both the same on every
               stage

    Communicates: a message from each virtual stage to the next; one all_reduce of two numbers.
    Raises InputError as the objective does.
    """
    schedule, comm = pipeline.schedule, pipeline.comm
    hidden, report = None, torch.zeros(2, dtype=torch.float64)
    for place in range(schedule.num_virtual_stages):
        stage, chunk = schedule.place_of(place)
        if stage != comm.rank:
            continue
        before = schedule.place_of(place - 1)[0] if place else stage
        if before != stage:
            hidden = comm.recv(before)
        one = ChunkPass(pipeline.stage, chunk, hidden, splits=False)
        hidden = one.forward(objective, batch, 1.0)
        if hidden is None:
            report[0], report[1] = one.loss_sum, int(one.num_tokens)
            continue
        after = schedule.place_of(place + 1)[0]
        if after != stage:
            comm.send(hidden.contiguous(), after)
    loss_sum, num_tokens = comm.all_reduce(report.to(comm.device)).tolist()
    return loss_sum, int(num_tokens)
