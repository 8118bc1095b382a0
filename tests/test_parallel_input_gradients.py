"""What the model's input would be told: gradients of the embedding's output equal one process."""

import comm_runtimes
import pytest
import torch
from hybrid_cases import GPT, make_hybrid, whole_batch
from parallel_cases import BOUND, LR, optimizer_of, tiny_model
from tensor_cases import watch_input

from slimlab.comm.launch import run_ranks
from slimlab.parallel.data import LOSS_DIVISOR, DataParallel
from slimlab.parallel.zero import Zero
from slimlab.plan.data_parallel import shard_sizes
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective

NUM_STEPS = 2  # the second with weights that the first has changed
LAYOUTS = {
    "pipeline": {"pipeline": 2},
    "tensor": {"tensor": 2},
    "data and pipeline": {"data": 2, "pipeline": 2},
    "data, ZeRO 3 and tensor": {"data": 2, "tensor": 2, "zero_stage": 3},
}


def serial():
    model = tiny_model(**GPT)
    found, optimizer = watch_input(model), optimizer_of(model)
    for step in range(NUM_STEPS):
        accumulate_gradients(model, whole_batch(step), causal_objective)
        optimizer.step()
    return found


def rows_of(comm, step):
    sizes = shard_sizes(len(whole_batch(step)[0]), comm.world_size)
    start = sum(sizes[: comm.rank])
    return slice(start, start + sizes[comm.rank])


def train_replica(comm, stage):
    """Rows of the batch -> their gradients, of each step; stage 0: plain data parallelism."""
    model = tiny_model(seed=comm.rank, **GPT)
    replica = Zero(model, comm, stage=stage, lr=LR) if stage else DataParallel(model, comm)
    optimizer, found, results = replica if stage else optimizer_of(model), watch_input(model), []
    for step in range(NUM_STEPS):
        rows = rows_of(comm, step)
        part = tuple(tensor[rows] for tensor in whole_batch(step))
        _, num_tokens = replica.gradients(part, causal_objective)
        # Losses go back as sums, divided by a constant; the sums over ranks are put right later.
        results.append((rows, torch.cat(found) * LOSS_DIVISOR / num_tokens))
        found.clear()
        optimizer.step()
    return results


def train_hybrid(comm, parallel):
    hybrid = make_hybrid(comm, {**parallel, "micro_batch_size": 2})
    first, results = hybrid.coordinates[1] == 0, []
    found = watch_input(hybrid.model) if first else []
    for step in range(NUM_STEPS):
        whole = whole_batch(step)
        share = hybrid.share_of(whole)
        _, num_tokens = hybrid.gradients(share)
        size = len(share[0])
        start = hybrid.coordinates[0] * size
        if first:
            rows = slice(start, start + size)
            results.append((rows, torch.cat(found) * LOSS_DIVISOR / num_tokens))
        found.clear()
        hybrid.step()
    return results


def check(results, least_ranks):
    true, seen = serial(), 0
    for ranks in results:
        seen += bool(ranks)
        for step, (rows, grads) in enumerate(ranks):
            expected = true[step][rows]
            error = float((grads - expected).abs().max() / expected.abs().max())
            assert error < BOUND, (step, rows, error)
    assert seen >= least_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_find_the_input_gradients_of_one_process(world_size, stage):
    check(run_ranks(train_replica, world_size, args=(stage,)), world_size)


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
@pytest.mark.parametrize("stage", [0, 3])
def test_replicas_that_are_processes_do_too(runtime, stage):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        check(run_ranks(train_replica, 2, backend=backend, args=(stage,)), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_find_the_input_gradients_of_one_process(layout):
    parallel = LAYOUTS[layout]
    world_size = parallel.get("data", 1) * parallel.get("pipeline", 1) * parallel.get("tensor", 1)
    results = run_ranks(train_hybrid, world_size, args=(parallel,))
    check(results, world_size // parallel.get("pipeline", 1))
