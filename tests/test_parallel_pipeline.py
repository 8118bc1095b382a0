"""A pipeline equals one process and torch's, under every schedule; its messages are predicted."""

import os
import signal

import comm_runtimes
import pytest
import torch
from hypothesis import given, settings
from parallel_cases import (
    BOUND,
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
from pipeline_cases import (
    NAMES,
    NUM_MICRO_BATCHES,
    any_schedules,
    check_equals_one_process,
    choices_for,
    put_together,
    schedule_of,
    train,
)
from torch.nn import functional as F

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.parallel.data import LOSS_DIVISOR, DataParallel
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.stages import stage_of
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.tensor_state import gather_whole
from slimlab.parallel.zero import Zero
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.pipeline_messages import predict_step
from slimlab.plan.pipeline_schedule import peak_activations, read_schedule
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import IGNORE, causal_objective
from slimlab.train.optimizer import clip_gradients


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_weights_equal_one_process(name, num_stages):
    choices = choices_for(name, num_stages)
    results = run_ranks(train, num_stages, args=(schedule_of(name, num_stages), choices))
    check_equals_one_process(results, choices)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_eight_stages_that_have_fewer_micro_batches_equal_one_process(name):
    choices = choices_for(name, 8)
    results = run_ranks(train, 8, args=(schedule_of(name, 8, 3), choices))
    check_equals_one_process(results, choices)


@pytest.mark.parametrize("name", NAMES)
def test_sends_that_wait_for_their_receivers_deadlock_no_schedule(name):
    choices = choices_for(name, 3)
    args = (schedule_of(name, 3), choices)
    check_equals_one_process(run_ranks(train, 3, args=args, eager_bytes=0), choices)


@pytest.mark.parametrize(
    ("runtime", "name", "num_stages"),
    [
        ("gloo", "1f1b", 2),
        ("gloo", "zb_v", 3),
        ("gloo", "interleaved", 4),
        ("mpich", "gpipe", 2),
        ("mpich", "interleaved", 3),
        ("mpich", "zb_h1", 4),
        ("openmpi", "1f1b", 2),
    ],
)
def test_processes_equal_one_process(runtime, name, num_stages):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    choices = choices_for(name, num_stages)
    args = (schedule_of(name, num_stages), choices)
    with comm_runtimes.started_by(runtime) as backend:
        check_equals_one_process(run_ranks(train, num_stages, backend=backend, args=args), choices)


@pytest.mark.parametrize(
    "more",
    [
        {"tie_embeddings": False},
        {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "bias": False},
        {"positions": "sinusoidal", "norm_place": "post"},
    ],
)
@pytest.mark.parametrize("name", ["interleaved", "zb_v"])
def test_other_models_equal_one_process(name, more):
    choices = choices_for(name, 2, **more)
    check_equals_one_process(run_ranks(train, 2, args=(schedule_of(name, 2), choices)), choices)


def packed_batch(step):
    inputs, targets = tiny_batch(step)
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).repeat(4, 1)[: len(inputs)]
    return inputs, targets, documents


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_documents_that_share_rows_are_told_apart_on_every_stage(name):
    choices = choices_for(name, 3, positions="rotary")
    schedule = schedule_of(name, 3)
    results = run_ranks(lambda comm: train(comm, schedule, choices, batch_of=packed_batch), 3)
    check_equals_one_process(results, choices, packed_batch)
    apart = serial_run(tiny_model(**choices), 1, packed_batch)[0]
    assert apart != serial_run(tiny_model(**choices), 1)[0]


def test_recomputation_and_layers_of_ones_own_change_nothing():
    choices, schedule = choices_for("interleaved", 2, num_layers=7), schedule_of("interleaved", 2)

    def program(comm):
        return train(comm, schedule, choices, recompute="block", layers=[3, 1, 1, 2])

    check_equals_one_process(run_ranks(program, 2), choices)


def test_a_schedule_of_ones_own_that_mixes_whole_and_parted_backward_passes_is_executed():
    choices = choices_for("1f1b", 2)
    rows = ["F0 F1 F2 I0 B1 W0 B2", "F0 B0 F1 I1 F2 I2 W2 W1"]
    results = run_ranks(train, 2, args=(read_schedule(rows), choices))
    check_equals_one_process(results, choices)


@given(any_schedules())
@settings(max_examples=15, deadline=None)
def test_every_order_that_can_be_is_executed(schedule):
    choices = CHOICES | {"num_layers": schedule.num_virtual_stages}

    def program(comm):
        pipeline = Pipeline(tiny_model(**choices), comm, schedule)
        loss, _ = pipeline.gradients(tiny_batch(0), causal_objective)
        assert pipeline.peak_passes == peak_activations(schedule)[comm.rank]
        return [float(loss)], [copy_of_grads(pipeline.stage)], {}

    model = tiny_model(**choices)
    losses, grads, _ = serial_run(model, 1)
    found = put_together(run_ranks(program, schedule.num_stages))
    check_same_run(found, (losses, grads, {}), zero_gradient_names(model))


def boundary_gradients(comm, choices):
    """The loss, and the gradient of what comes in, of every stage but the first."""
    pipeline = Pipeline(tiny_model(**choices), comm, schedule_of("1f1b", comm.world_size, 1))
    seen, stage = [], pipeline.stage
    first = stage.blocks[stage.blocks_of(0)[0]]
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pipeline.gradients(tiny_batch(0), causal_objective)
    return seen[0].grad if comm.rank else None


def test_gradients_of_what_comes_in_equal_those_of_one_process():
    choices = choices_for("1f1b", 3)
    found = run_ranks(boundary_gradients, 3, args=(choices,))
    model, seen = tiny_model(**choices), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    loss_sum, _ = causal_objective(model, tiny_batch(0))
    layers = stage_of(tiny_model(**choices), schedule_of("1f1b", 3), 0).layers
    inputs = [seen[sum(layers[:stage])] for stage in (1, 2)]
    for mine, true in zip(found[1:], torch.autograd.grad(loss_sum / LOSS_DIVISOR, inputs)):
        assert float((mine - true).abs().max()) < BOUND * float(true.abs().max())


def even_batch(step):
    """As many sequences as torch can cut evenly."""
    return tuple(torch.cat([one, one[:1]]) for one in tiny_batch(step))


class Part(torch.nn.Module):
    """A stage as torch calls it: ids on the first rank, activations on the others."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        if self.stage.is_first(0):
            return self.stage(x)
        return self.stage(torch.zeros(x.shape[:2], dtype=torch.long), x)


def train_torch(comm, name, choices):
    from torch.distributed import pipelining

    kind = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}[name]
    rank, last = comm.rank, comm.rank == comm.world_size - 1
    part = Part(stage_of(tiny_model(**choices), schedule_of(name, comm.world_size), rank))
    stage = pipelining.PipelineStage(part, rank, comm.world_size, torch.device("cpu"))
    optimizer = optimizer_of(part.stage)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        inputs, targets = even_batch(step)
        num_tokens = int((targets != IGNORE).sum())

        def loss_of(logits, wanted, num_tokens=num_tokens):
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / (
                num_tokens
            )

        schedule = kind(stage, NUM_MICRO_BATCHES, loss_fn=loss_of, scale_grads=False)
        optimizer.zero_grad()
        pieces = []
        given = {"target": targets, "losses": pieces} if last else {}
        schedule.step(*([inputs] if rank == 0 else []), **given)
        loss = torch.stack(pieces).sum().detach() if last else torch.zeros(()).double()
        losses.append(float(comm.all_reduce(loss)))
        grads.append(copy_of_grads(part.stage))
        optimizer.step()
    return losses, grads, copy_of_weights(part.stage)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_ours_equals_torch_pipelining_and_both_equal_one_process(name):
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)
    # Torch adds up no gradients of a table that is on two stages.
    choices = choices_for(name, 2, tie_embeddings=False)

    def program(comm):
        ours = train(comm, schedule_of(name, 2), choices, batch_of=even_batch)
        return ours, train_torch(comm, name, choices)

    ours, theirs = zip(*run_ranks(program, 2, backend="gloo"))
    check_equals_one_process(ours, choices, even_batch)
    check_equals_one_process(theirs, choices, even_batch)
    names = zero_gradient_names(tiny_model(**choices))
    check_same_run(put_together(ours), put_together(theirs), names)


def train_on_mesh(comm, shape, name, choices, sequence_parallel, zero):
    mesh = Mesh(comm, shape)
    model = tensor_parallel(
        tiny_model(**choices), mesh.group("tensor"), sequence_parallel=sequence_parallel
    )
    pipeline = Pipeline(model, mesh.group("pipeline"), schedule_of(name, shape.pipeline, 3))
    group = mesh.group("data")
    if zero:
        replica = optimizer = Zero(pipeline.stage, group, stage=1, lr=1e-2)
    else:
        replica, optimizer = DataParallel(pipeline.stage, group), optimizer_of(pipeline.stage)
    pipeline.join(replica)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        sizes, place = shard_sizes(8, shape.data), mesh.coordinates[0]
        here = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
        part = tuple(one[here] for one in wide_batch(step))
        loss, _ = pipeline.gradients(part, tensor_parallel_objective)
        losses.append(float(loss))
        own = replica.full_gradients() if zero else copy_of_grads(pipeline.stage)
        grads.append(gather_whole(pipeline.stage, own))
        optimizer.step()
    own = replica.full_weights() if zero else copy_of_weights(pipeline.stage)
    return losses, grads, gather_whole(pipeline.stage, own)


def wide_batch(step):
    """Six positions, which two ranks can share."""
    inputs, targets = even_batch(step)
    return torch.cat([inputs, inputs[:, :1]], 1), torch.cat([targets, targets[:, :1]], 1)


@pytest.mark.parametrize(
    ("shape", "name", "sequence_parallel", "zero"),
    [
        (MeshShape(2, 2, 1), "interleaved", False, False),
        (MeshShape(2, 2, 1), "zb_v", False, True),
        (MeshShape(1, 2, 2), "1f1b", True, False),
        (MeshShape(1, 2, 2), "zb_h1", True, False),
        (MeshShape(2, 2, 2), "1f1b", False, True),
    ],
)
def test_replicas_of_tensor_parallel_stages_equal_one_process(shape, name, sequence_parallel, zero):
    sizes = {"vocab_size": 12, "seq_len": 6}
    choices = choices_for(name, 2, **sizes)
    args = (shape, name, choices, sequence_parallel, zero)
    check_equals_one_process(
        run_ranks(train_on_mesh, shape.world_size, args=args), choices, wide_batch
    )


def calls_of_a_step(comm, schedule, choices):
    pipeline = Pipeline(tiny_model(**choices), comm, schedule)
    before = len(comm.ledger.entries)
    pipeline.gradients(tiny_batch(0), causal_objective)
    return [(one.call, one.peer, one.n_bytes) for one in comm.ledger.entries[before:]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_messages_and_payload_are_predicted(name, tied):
    schedule = schedule_of(name, 3)
    choices = choices_for(name, 3, tie_embeddings=tied)
    found = run_ranks(calls_of_a_step, 3, args=(schedule, choices))
    sizes = shard_sizes(7, NUM_MICRO_BATCHES)
    table_bytes = 11 * 8 * 8 if tied else 0
    predicted = predict_step(schedule, sizes, 5, 8, 8, table_bytes=table_bytes)
    for calls, plan in zip(found, predicted, strict=True):
        sent = tuple((peer, n_bytes) for call, peer, n_bytes in calls if call == "send")
        received = tuple((peer, n_bytes) for call, peer, n_bytes in calls if call == "recv")
        reduced = tuple(n_bytes for call, _, n_bytes in calls if call == "all_reduce")
        assert (sent, received, reduced) == (plan.sent, plan.received, plan.all_reduces)
        assert len(calls) == plan.num_calls
    assert all(plan.sent_bytes > 0 for plan in predicted)


def test_slices_of_the_positions_make_messages_shorter():
    choices, shape = choices_for("1f1b", 2, vocab_size=12, seq_len=6), MeshShape(1, 2, 2)

    def program(comm):
        mesh = Mesh(comm, shape)
        model = tensor_parallel(tiny_model(**choices), mesh.group("tensor"), sequence_parallel=True)
        pipeline = Pipeline(model, mesh.group("pipeline"), schedule_of("1f1b", 2))
        before = len(comm.ledger.entries)
        pipeline.gradients(wide_batch(0), tensor_parallel_objective)
        sent = [one for one in comm.ledger.entries[before:] if one.call == "send"]
        return tuple((one.peer, one.n_bytes) for one in sent)

    sizes = shard_sizes(8, NUM_MICRO_BATCHES)
    plan = predict_step(schedule_of("1f1b", 2), sizes, 6 // 2, 8, 8)
    assert run_ranks(program, 4) == [plan[0].sent] * 2 + [plan[1].sent] * 2


def clipped(comm, name, choices, max_norm):
    pipeline = Pipeline(tiny_model(**choices), comm, schedule_of(name, comm.world_size))
    pipeline.gradients(tiny_batch(0), causal_objective)
    total_norm = pipeline.clip(max_norm)
    return float(total_norm), copy_of_grads(pipeline.stage)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_takes_the_length_of_all_stages_and_a_tied_table_once(name, max_norm):
    choices = choices_for(name, 3)
    model = tiny_model(**choices)
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    total_norm, grads = float(clip_gradients(model.parameters(), max_norm)), copy_of_grads(model)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for mine, own in run_ranks(clipped, 3, args=(name, choices, max_norm)):
        assert abs(mine - total_norm) < BOUND * total_norm
        for param, grad in own.items():
            assert float((grad - grads[param]).abs().max()) < BOUND * largest


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_what_is_frozen_gets_no_gradient_on_any_stage(name):
    choices = choices_for(name, 2, tie_embeddings=False)
    frozen = ("embedding.", "blocks.0.", "blocks.1.", "blocks.3.")

    def freeze(model):
        for param_name, param in model.named_parameters():
            param.requires_grad_(not param_name.startswith(frozen))
        return model

    def program(comm):
        pipeline = Pipeline(freeze(tiny_model(**choices)), comm, schedule_of(name, 2))
        pipeline.gradients(tiny_batch(0), causal_objective)
        return copy_of_grads(pipeline.stage)

    model = freeze(tiny_model(**choices))
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    expected = copy_of_grads(model)
    first, second = run_ranks(program, 2)
    found = first | second
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for param_name, grad in expected.items():
        assert float((found[param_name] - grad).abs().max()) < BOUND * largest


def failing(comm, failure):
    pipeline = Pipeline(tiny_model(**choices_for("1f1b", 2)), comm, schedule_of("1f1b", 2))
    if comm.rank == 1:
        pipeline.stage.final_norm.register_forward_pre_hook(lambda *given: failure())
    pipeline.gradients(tiny_batch(0), causal_objective)


def divide_by_zero():
    return 1 / 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("runtime", "failure"),
    [("threads", divide_by_zero), ("gloo", die), ("mpich", divide_by_zero)],
)
def test_a_stage_that_raises_or_is_killed_ends_all(runtime, failure):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend, pytest.raises(RankError, match="rank 1"):
        run_ranks(failing, 2, backend=backend, args=(failure,))
