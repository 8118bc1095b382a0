"""Training steps of a pipeline under 1F1B: the book's, and that of torch.distributed.pipelining.

Both have the same stages, of the same modules, and cut the batch into NUM_MICRO_BATCHES, or single
sequences if it has fewer. Theirs averages the means of the micro-batches, which is the mean of the
batch, since all have equally many tokens.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

from benchmarks.parallel_rivals import Step, Task, optimizer_of
from slimlab.comm.base import Communicator
from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.schedules import one_forward_one_backward
from slimlab.parallel.stages import Stage, stage_of
from slimlab.train.objectives import causal_objective

NUM_MICRO_BATCHES = 8


def our_pipeline(task: Task, comm: Communicator) -> Step:
    """Return a step of slimlab.parallel.pipeline on a communicator; every rank sees the batch."""
    schedule = one_forward_one_backward(comm.world_size, _num_pieces(task))
    pipeline = Pipeline(task.model(), comm, schedule)
    optimizer = optimizer_of(pipeline.stage)

    def step() -> Tensor:
        loss, _ = pipeline.gradients(task.whole, causal_objective)
        optimizer.step()
        return loss

    return step


def their_pipeline(task: Task) -> Step:
    """Return a step of Schedule1F1B; the last rank returns the loss times world_size, others 0."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ours = one_forward_one_backward(world_size, _num_pieces(task))
    part = Part(stage_of(task.model(), ours, rank))
    stage = PipelineStage(part, rank, world_size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, _num_pieces(task), loss_fn=_mean_loss)
    optimizer, (inputs, targets) = optimizer_of(part), task.whole
    first, last = rank == 0, rank == world_size - 1

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = []
        given = {"target": targets, "losses": losses} if last else {}
        schedule.step(*([inputs] if first else []), **given)
        optimizer.step()
        return torch.stack(losses).mean().detach() * world_size if last else torch.zeros(())

    return step


class Part(nn.Module):
    """A stage that is called with ids on the first rank and with activations on others.

    stage  of one chunk
    """

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """Map ids (B, T), or activations (B, T, D), to activations or logits."""
        return self.stage(x) if self.stage.is_first(0) else self.stage(x[..., 0], x)


def _num_pieces(task: Task) -> int:
    return min(NUM_MICRO_BATCHES, len(task.whole[0]))


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
