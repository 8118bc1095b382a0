"""Programs that train a tiny model as a pipeline, and what their stages have, put together."""

import torch
from hypothesis import strategies as st
from parallel_cases import (
    CHOICES,
    NUM_STEPS,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    serial_run,
    tiny_batch,
    tiny_model,
    zero_gradient_names,
)

from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.schedules_zero_bubble import SCHEDULES, make_schedule
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    PLACEMENTS,
    WEIGHT_GRADIENT,
    Instruction,
    Schedule,
)
from slimlab.train.objectives import causal_objective

NAMES = tuple(SCHEDULES)
NUM_MICRO_BATCHES = 4
CHUNKS = {"interleaved": 2, "zb_v": 2}


def schedule_of(name, num_stages, num_micro_batches=NUM_MICRO_BATCHES):
    num_chunks = 2 if name == "interleaved" else None
    return make_schedule(name, num_stages, num_micro_batches, num_chunks)


def choices_for(name, num_stages, **more):
    """One layer more than virtual stages, so that stages are uneven."""
    return CHOICES | {"num_layers": num_stages * CHUNKS.get(name, 1) + 1} | more


def train(comm, schedule, choices, *, batch_of=tiny_batch, recompute="none", layers=None):
    model = tiny_model(seed=comm.rank, **choices)  # other weights than rank 0 has, until it says
    model.recompute = recompute
    pipeline = Pipeline(model, comm, schedule, layers=layers)
    optimizer = optimizer_of(pipeline.stage)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        loss, _ = pipeline.gradients(batch_of(step), causal_objective)
        losses.append(float(loss))
        grads.append(copy_of_grads(pipeline.stage))
        optimizer.step()
    return losses, grads, copy_of_weights(pipeline.stage)


def put_together(results):
    """Join what all ranks have into the run of a whole model; copies must be equal."""
    losses, steps, weights = results[0][0], [{} for _ in results[0][1]], {}
    for found, grads, own in results:
        assert found == losses  # the same number on every rank, bit by bit
        for step, named in zip(steps, grads):
            _join(step, named)
        _join(weights, own)
    return losses, steps, weights


def _join(whole, part):
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, whole.setdefault(name, tensor), rtol=1e-13, atol=1e-15)


def check_equals_one_process(results, choices, batch_of=tiny_batch):
    model = tiny_model(**choices)
    expected = serial_run(model, batch_of=batch_of)
    check_same_run(put_together(results), expected, zero_gradient_names(model))


@st.composite
def any_schedules(draw):
    """Any order in which a pipeline can work: one instruction after the other, as chance has it."""
    num_stages, num_chunks = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_micro_batches = draw(st.integers(1, 4))
    placement = draw(st.sampled_from(PLACEMENTS))
    empty = Schedule("any", num_micro_batches, ((),) * num_stages, num_chunks, placement)
    left, done = [], set()
    for virtual in range(empty.num_virtual_stages):
        stage, chunk = empty.place_of(virtual)
        for number in range(num_micro_batches):
            parted = (INPUT_GRADIENT, WEIGHT_GRADIENT) if draw(st.booleans()) else (BACKWARD,)
            left += [(stage, Instruction(kind, number, chunk)) for kind in (FORWARD, *parted)]
    orders = [[] for _ in range(num_stages)]
    while left:
        able = [one for one in left if set(empty.needs(*one)) <= done]
        stage, instruction = draw(st.sampled_from(able))
        left.remove((stage, instruction))
        orders[stage].append(instruction)
        done |= set(empty.makes(stage, instruction))
    return Schedule("any", num_micro_batches, tuple(map(tuple, orders)), num_chunks, placement)
