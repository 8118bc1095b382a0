"""ZeRO equals one process, fully_shard and ZeroRedundancyOptimizer; its bytes are predicted."""

import pytest
from parallel_cases import (
    BATCH_SIZE,
    LR,
    NUM_STEPS,
    check_same_run,
    serial_run,
    tiny_batch,
    tiny_model,
    zero_gradient_names,
)

from slimlab.comm.launch import run_ranks
from slimlab.parallel.zero import Zero
from slimlab.plan.data_parallel import shard_sizes
from slimlab.train.objectives import IGNORE, causal_objective


def my_part(comm, step):
    sizes = shard_sizes(BATCH_SIZE, comm.world_size)
    start = sum(sizes[: comm.rank])
    return tuple(one[start : start + sizes[comm.rank]] for one in tiny_batch(step))


def train(comm, stage, micro_batch_size=None, recompute="none", **choices):
    model = tiny_model(seed=comm.rank)  # other weights than rank 0 has, until it says
    model.recompute = recompute
    sharded = Zero(model, comm, stage=stage, lr=LR, **choices)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        part = my_part(comm, step)
        loss, num_tokens = sharded.gradients(part, causal_objective, micro_batch_size)
        assert num_tokens == int((tiny_batch(step)[1] != IGNORE).sum())
        losses.append(float(loss))
        grads.append(sharded.full_gradients())
        sharded.step()
    return losses, grads, sharded.full_weights()


def check_runs(results):
    model = tiny_model()
    expected = serial_run(model)
    for found in results:
        check_same_run(found, expected, zero_gradient_names(model))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_losses_gradients_and_weights_equal_one_process(world_size, stage):
    assert world_size < 8 or 0 in shard_sizes(BATCH_SIZE, world_size)  # one rank has no data
    check_runs(run_ranks(train, world_size, args=(stage,)))
