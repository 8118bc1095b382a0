"""Data parallelism equals one process and DistributedDataParallel; its calls are predicted."""

import copy
from contextlib import nullcontext

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BATCH_SIZE,
    BOUND,
    CHOICES,
    LR,
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
from torch import nn

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import CommunicationError, RankError
from slimlab.config import InputError
from slimlab.parallel.data import DataParallel
from slimlab.parallel.data_local import average_weights
from slimlab.parallel.data_replicas import broadcast_model, check_replicas
from slimlab.parallel.data_shards import DataShards, until_all_end
from slimlab.plan.data_parallel import predict_broadcast, predict_step, shard_sizes
from slimlab.train.objectives import IGNORE, causal_objective
from slimlab.train.optimizer import make_optimizer

WAYS = {
    "buckets": {"bucket_bytes": 1500},
    "one flat buffer": {"bucket_bytes": None},
    "buckets after the backward pass": {"bucket_bytes": 1500, "overlap": False},
    "one parameter at a time": {"bucket_bytes": 1},
}


def my_part(comm, step):
    sizes = shard_sizes(BATCH_SIZE, comm.world_size)
    start = sum(sizes[: comm.rank])
    return tuple(one[start : start + sizes[comm.rank]] for one in tiny_batch(step))


def train(comm, way, micro_batch_size=None, choices=CHOICES):
    model = tiny_model(seed=comm.rank, **choices)  # other weights than rank 0 has, until it says
    replica, optimizer = DataParallel(model, comm, **way), optimizer_of(model)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        part = my_part(comm, step)
        loss, num_tokens = replica.gradients(part, causal_objective, micro_batch_size)
        assert num_tokens == int((tiny_batch(step)[1] != IGNORE).sum())
        losses.append(float(loss))
        grads.append(copy_of_grads(model))
        optimizer.step()
    check_replicas(model, comm)
    return losses, grads, copy_of_weights(model)


def check_runs(results):
    model = tiny_model()
    expected = serial_run(model)
    for found in results:
        check_same_run(found, expected, zero_gradient_names(model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_losses_gradients_and_weights_equal_one_process(world_size, way):
    check_runs(run_ranks(train, world_size, args=(WAYS[way],)))


def train_both_ways(comm):
    return [train(comm, WAYS[way]) for way in ("buckets", "buckets after the backward pass")]


@pytest.mark.parametrize(
    ("runtime", "world_size"),
    [(runtime, n) for runtime in ("gloo", "mpich") for n in (1, 2, 3, 4)] + [("openmpi", 2)],
)
def test_processes_equal_one_process(runtime, world_size):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train_both_ways, world_size, backend=backend)
    check_runs([found for ways in results for found in ways])


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_of_micro_batches_add_up_also_where_ranks_have_different_numbers(world_size):
    # 7 sequences: 4 and 3 of them in pieces of 2, or 3, 2 and 2.
    check_runs(run_ranks(train, world_size, args=(WAYS["buckets"], 2)))


def test_eight_ranks_of_which_one_has_no_data_equal_one_process():
    assert 0 in shard_sizes(BATCH_SIZE, 8)
    check_runs(run_ranks(train, 8, args=(WAYS["buckets"],)))


def train_ddp(comm):
    """Torch's own, its mean of means made right by weights: its gradients are averages."""
    from torch.nn.parallel import DistributedDataParallel

    model = tiny_model()
    wrapped, optimizer = DistributedDataParallel(model), optimizer_of(model)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_sum, num_tokens = causal_objective(wrapped, my_part(comm, step))
        counts = comm.all_reduce(torch.tensor([float(loss_sum), num_tokens], dtype=torch.float64))
        (loss_sum * comm.world_size / counts[1]).backward()
        losses.append(float(counts[0] / counts[1]))
        grads.append(copy_of_grads(model))
        optimizer.step()
    return losses, grads, copy_of_weights(model)


def test_ours_equals_distributed_data_parallel_and_both_equal_one_process():
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)

    def program(comm):
        return train(comm, WAYS["buckets"]), train_ddp(comm)

    for ours, theirs in run_ranks(program, 2, backend="gloo"):
        check_runs([ours, theirs])
        check_same_run(ours, theirs, zero_gradient_names(tiny_model()))


def test_the_key_bias_alone_has_a_gradient_of_rounding_noise():
    model = tiny_model()
    _, grads, _ = serial_run(model)
    largest = max(float(grad.abs().max()) for grad in grads[0].values())
    noise = [name for name, g in grads[0].items() if float(g.abs().max()) < 1e-12 * largest]
    assert noise == zero_gradient_names(model)
    assert len(noise) == 2


@pytest.mark.parametrize("bucket_bytes", [None, 1, 1500, 10_000, 10**9])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_calls_and_payload_are_those_predicted(world_size, overlap, bucket_bytes):
    def program(comm):
        model = tiny_model()
        replica = DataParallel(model, comm, bucket_bytes=bucket_bytes, overlap=overlap)
        before = len(comm.ledger.entries)
        replica.gradients(my_part(comm, 0), causal_objective, micro_batch_size=1)
        calls = [(entry.call, entry.n_bytes) for entry in comm.ledger.entries]
        return calls[:before], calls[before:]

    sizes = [param.numel() for param in tiny_model().parameters()]
    step = predict_step(sizes, 8, world_size, bucket_bytes)
    start = predict_broadcast([8 * size for size in sizes], world_size, bucket_bytes)
    predicted = [("all_reduce", n_bytes) for n_bytes in (*step.bucket_bytes, step.report_bytes)]
    for found in run_ranks(program, world_size):
        assert found == (list(start), predicted)
    assert step.num_calls == len(predicted)
    assert step.payload_bytes == sum(n_bytes for _, n_bytes in predicted)


def test_buckets_leave_during_the_backward_pass_unless_told_otherwise():
    def program(comm, overlap):
        model, sent = tiny_model(), []
        replica = DataParallel(model, comm, bucket_bytes=1500, overlap=overlap)
        first = next(iter(model.parameters()))  # the last to have its gradient
        first.register_hook(lambda grad: sent.append(comm.ledger.num_calls("all_reduce")))
        replica.gradients(my_part(comm, 0), causal_objective)
        return sent[-1], len(replica.buckets.buckets)

    for before, num_buckets in run_ranks(program, 2, args=(True,)):
        assert before >= num_buckets - 2 > 0
    assert [before for before, _ in run_ranks(program, 2, args=(False,))] == [0, 0]


def test_no_sync_sends_nothing_and_adds_to_what_is_there():
    def program(comm):
        model = tiny_model()
        replica = DataParallel(model, comm)
        before = len(comm.ledger.entries)
        for row in range(3):
            piece = tuple(one[row : row + 1] for one in my_part(comm, 0))
            with replica.no_sync() if row < 2 else nullcontext():
                result = replica.backward(*causal_objective(model, piece))
            assert (result is None) == (row < 2)
            assert (len(comm.ledger.entries) == before) == (row < 2)
        part = tuple(one[:3] for one in my_part(comm, 0))
        summed = copy_of_grads(model)
        replica.gradients(part, causal_objective)
        whole = copy_of_grads(model)
        for name in whole.keys() - set(zero_gradient_names(model)):
            torch.testing.assert_close(summed[name], whole[name], rtol=0, atol=BOUND)
        return True

    assert run_ranks(program, 2) == [True, True]


def test_ranks_that_run_out_of_data_take_part_with_nothing_until_all_have():
    numbers = [3, 1, 2]  # batches of each rank

    def program(comm):
        model, seen = tiny_model(), []
        replica = DataParallel(model, comm)
        batches = [my_part(comm, step) for step in range(numbers[comm.rank])]
        for batch in until_all_end(comm, batches):
            _, num_tokens = replica.gradients(batch, causal_objective)
            seen.append((batch is not None, num_tokens))
        check_replicas(model, comm)
        return seen

    results = run_ranks(program, 3)
    for rank, seen in enumerate(results):
        assert [has_data for has_data, _ in seen] == [step < numbers[rank] for step in range(3)]
    assert len({tuple(n for _, n in seen) for seen in results}) == 1
    joined = results[0][2][1]
    assert 0 < joined < int((tiny_batch(2)[1] != IGNORE).sum())


@pytest.mark.parametrize("runtime", ["threads", "gloo"])
def test_a_rank_that_ends_early_without_join_leaves_no_rank_waiting(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)

    def program(comm):
        replica = DataParallel(tiny_model(), comm)
        for step in range(2 - comm.rank):
            replica.gradients(my_part(comm, step), causal_objective)

    with pytest.raises(CommunicationError) as caught:
        run_ranks(program, 2, backend=runtime, timeout_s=30)
    assert "all_reduce" in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_nan_in_one_ranks_gradient_is_named_on_every_rank_and_no_weight_changes(way):
    bad = "blocks.1.feed_forward.up_proj.weight"

    def program(comm):
        model = tiny_model()
        replica = DataParallel(model, comm, **WAYS[way])
        before = copy_of_weights(model)
        if comm.rank == 1:
            model.get_parameter(bad).register_hook(lambda grad: grad * float("nan"))
        with pytest.raises(InputError) as caught:
            replica.gradients(my_part(comm, 0), causal_objective)
        assert all(bool((before[n] == p).all()) for n, p in copy_of_weights(model).items())
        return str(caught.value)

    results = run_ranks(program, 3)
    assert len(set(results)) == 1
    assert f"rank 1: {bad}\n" in results[0]
    assert "rank 0" not in results[0]


def test_gradients_whose_sum_overflows_are_finite_all_the_same():
    def program(comm):
        model = nn.Linear(4, 1, bias=False)
        replica = DataParallel(model, comm)
        # Four gradients of 3e38 in the bucket: more than float32 holds, if they are added.
        replica.backward(model.weight.sum() * 3e38, 4096, scale=lambda loss: loss * 1024)
        return model.weight.grad

    (grad,) = run_ranks(program, 1)
    torch.testing.assert_close(grad, torch.full((1, 4), 3e38 * 1024 / 4096))


def test_parameters_that_no_rank_used_stay_without_gradient_and_others_get_theirs():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("both", "second", "nobody", "frozen"):
                setattr(self, name, nn.Parameter(torch.ones(3, dtype=torch.float64)))
            self.frozen.requires_grad_(False)

    def program(comm):
        model = Branches()
        replica = DataParallel(model, comm)
        for _ in range(2):  # what was unused must not have a gradient left from before
            loss = (model.both * model.frozen).sum() * (1 + comm.rank)
            loss = loss + (model.second.sum() if comm.rank else 0)
            replica.backward(loss, 1)
        return {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()}

    expected = {"both": [1.5] * 3, "second": [0.5] * 3, "nobody": None, "frozen": None}
    assert run_ranks(program, 2) == [expected, expected]


def test_a_batch_without_a_target_on_any_rank_is_refused_on_every_rank():
    def program(comm):
        replica = DataParallel(tiny_model(), comm)
        inputs, targets = my_part(comm, 0)
        with pytest.raises(InputError, match="none on any of 2 ranks"):
            replica.gradients((inputs, torch.full_like(targets, IGNORE)), causal_objective)
        return replica.gradients(my_part(comm, 0), causal_objective)[1]

    assert min(run_ranks(program, 2)) > 0


def test_a_second_replica_of_one_model_works_after_the_first_was_closed():
    def program(comm):
        model = tiny_model()
        DataParallel(model, comm).close()
        replica = DataParallel(model, comm, broadcast=False)
        before = comm.ledger.num_calls()
        replica.gradients(my_part(comm, 0), causal_objective)
        return comm.ledger.num_calls() - before

    assert run_ranks(program, 2) == [2, 2]


def test_a_replica_that_is_closed_makes_no_gradients_and_says_so():
    def program(comm):
        replica = DataParallel(tiny_model(), comm)
        replica.close()
        replica.close()
        before, part = comm.ledger.num_calls(), my_part(comm, 0)
        for call in (
            lambda: replica.gradients(part, causal_objective),
            lambda: replica.backward(*causal_objective(replica.model, part)),
            replica.begin_passes,
        ):
            with pytest.raises(InputError, match=r"after close\(\)"):
                call()
        return comm.ledger.num_calls() - before

    assert run_ranks(program, 2) == [0, 0]


def test_a_step_that_was_given_up_leaves_nothing_behind():
    def program(comm):
        model, calls = tiny_model(), []
        replica = DataParallel(model, comm)

        def fails_once(model, piece):
            calls.append(piece)
            if len(calls) == 2:
                raise InterruptedError
            return causal_objective(model, piece)

        with pytest.raises(InterruptedError):
            replica.gradients(my_part(comm, 0), fails_once, 1)
        return replica.gradients(my_part(comm, 0), fails_once, 1)[1]

    assert set(run_ranks(program, 2)) == {int((tiny_batch(0)[1] != IGNORE).sum())}


def steps_alone(comm, optimizer_name, num_steps, averages_weights):
    """Weights after steps with averaged gradients, or after steps alone and averaging."""
    model = nn.Linear(3, 1, bias=False).double()
    broadcast_model(model, comm)
    optimizer = make_optimizer(optimizer_name, model, lr=0.1, weight_decay=0.0, momentum=0.0)
    inputs = torch.arange(1.0, 4.0, dtype=torch.float64) * (1 - 3 * comm.rank)
    for _ in range(num_steps):
        optimizer.zero_grad()
        ((model(inputs) - 1) ** 2 / 20).sum().backward()
        if not averages_weights:
            comm.all_reduce(model.weight.grad, op="mean", out=model.weight.grad)
        optimizer.step()
    if averages_weights:
        average_weights(model, comm, bucket_bytes=1)
    check_replicas(model, comm)
    return model.weight.detach(), comm.ledger.num_calls("all_reduce")


@pytest.mark.parametrize(
    ("optimizer_name", "num_steps", "equal"),
    [("sgd", 1, True), ("sgd", 2, False), ("adamw_own", 1, False)],
)
def test_averaged_weights_are_those_of_averaged_gradients_after_one_step_of_sgd_alone(
    optimizer_name, num_steps, equal
):
    def program(comm):
        before = torch.random.get_rng_state()
        alone, num_calls = steps_alone(comm, optimizer_name, num_steps, True)
        torch.random.set_rng_state(before)
        together, _ = steps_alone(comm, optimizer_name, num_steps, False)
        return float((alone - together).abs().max()), num_calls

    for difference, num_calls in run_ranks(program, 2):
        assert num_calls == 1
        assert difference < BOUND if equal else difference > 1e-3


def test_gradients_lie_in_the_buckets_and_nowhere_else():
    def program(comm):
        model = tiny_model()
        replica = DataParallel(model, comm, bucket_bytes=1500)
        replica.gradients(my_part(comm, 0), causal_objective, 2)
        flats = [bucket.flat.untyped_storage() for bucket in replica.buckets.buckets]
        homes = {param.grad.untyped_storage().data_ptr() for param in model.parameters()}
        assert homes == {flat.data_ptr() for flat in flats}
        return sum(flat.nbytes() for flat in flats)

    held_bytes = sum(8 * param.numel() for param in tiny_model().parameters())
    assert run_ranks(program, 2) == [held_bytes] * 2


def go_on(comm, start, steps):
    """Train some steps from a state of model and optimizer, on samples that DataShards chooses."""
    model = tiny_model()
    optimizer = optimizer_of(model)
    replica = DataParallel(model, comm)
    if start is not None:
        # Ranks that are threads are given the same objects, and an optimizer keeps what it loads.
        weights, state = copy.deepcopy(start)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    shards = DataShards(
        BATCH_SIZE, 4, rank=comm.rank, world_size=comm.world_size, seed=3, last="short"
    )
    for step in steps:
        samples = shards(step)
        replica.gradients(tuple(one[samples] for one in tiny_batch(0)), causal_objective)
        optimizer.step()
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def test_a_run_that_goes_on_with_other_ranks_ends_with_the_weights_of_one_process():
    # Two epochs of two steps; two ranks make the first three steps, three the last.
    (whole,) = run_ranks(go_on, 1, args=(None, range(4)))
    first = run_ranks(go_on, 2, args=(None, range(3)))[0]
    for weights, _ in run_ranks(go_on, 3, args=(first, range(3, 4))):
        for name in weights.keys() - set(zero_gradient_names(tiny_model())):
            scale = max(float(whole[0][name].abs().max()), 4 * LR)
            assert float((weights[name] - whole[0][name]).abs().max()) < BOUND * scale, name


def test_models_that_differ_are_refused_before_a_weight_is_sent():
    def program(comm):
        model = nn.Linear(3, 2 + (comm.rank == 2))
        with pytest.raises(InputError, match="another on rank 2 than on rank 0"):
            broadcast_model(model, comm)
        return comm.ledger.num_calls("broadcast")

    assert run_ranks(program, 3) == [0, 0, 0]


def test_weights_and_buffers_come_from_one_rank_whatever_their_dtypes():
    class Mixed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 3), value))
            self.narrow = nn.Parameter(torch.full((), value, dtype=torch.bfloat16))
            self.register_buffer("steps", torch.tensor([int(value)]))
            self.register_buffer("mask", torch.tensor([value > 1, True]), persistent=False)

    def program(comm):
        model = Mixed(float(comm.rank))
        with pytest.raises(InputError, match=r"rank 1 in weight \(3 of 4\); rank 2"):
            check_replicas(model, comm)
        broadcast_model(model, comm, src=2)
        check_replicas(model, comm)
        return [tensor.flatten().tolist() for tensor in (*model.parameters(), *model.buffers())]

    assert run_ranks(program, 3) == [[[2.0] * 6, [2.0], [2], [True, True]]] * 3


def test_replicas_that_drifted_apart_are_named():
    def program(comm):
        model = tiny_model()
        broadcast_model(model, comm)
        if comm.rank == 1:
            with torch.no_grad():
                model.blocks[0].attention.q_proj.weight[0, 0] += 1e-15
        with pytest.raises(InputError, match=r"rank 1 in blocks.0.attention.q_proj.weight \(1 of"):
            check_replicas(model, comm)

    run_ranks(program, 2)


def test_a_second_gradient_of_one_pass_is_refused():
    def program(comm):
        model = nn.Linear(2, 1)
        replica = DataParallel(model, comm)
        loss = model(torch.ones(1, 2)).sum()
        with replica.no_sync():
            replica.backward(loss, 1)
        model(torch.ones(1, 2)).sum().backward()

    with pytest.raises(RankError, match="a second one for"):
        run_ranks(program, 1)


@pytest.mark.parametrize("bucket_bytes", [0, 1.5, True])
def test_a_bucket_has_a_whole_number_of_bytes(bucket_bytes):
    def program(comm):
        DataParallel(tiny_model(), comm, bucket_bytes=bucket_bytes)

    with pytest.raises(RankError, match="bucket_bytes"):
        run_ranks(program, 1)


def test_a_model_that_is_frozen_is_refused():
    def program(comm):
        DataParallel(nn.Linear(2, 1).requires_grad_(False), comm)

    with pytest.raises(RankError, match="parameters that require a gradient"):
        run_ranks(program, 1)
