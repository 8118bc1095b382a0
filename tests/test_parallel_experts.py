"""Experts on several ranks equal experts in one process, gradients too; what travels is counted."""

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BATCH_SIZE,
    BOUND,
    LR,
    NUM_STEPS,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    tiny_batch,
    tiny_model,
)
from torch import nn

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import InputError
from slimlab.parallel.experts import (
    MixtureOfExperts,
    exchange_rows,
    expert_gradients,
    expert_names,
    expert_parallel,
)
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.experts import predict_experts, rows_per_rank
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import IGNORE, causal_objective

D, NUM_EXPERTS, NUM_TOKENS = 6, 12, 29


def layer_of(top_k, **choices):
    torch.manual_seed(0)
    return MixtureOfExperts(D, 8, NUM_EXPERTS, top_k=top_k, **choices).double()


def tokens_of():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, NUM_TOKENS, D, generator=generator, dtype=torch.float64)


def slow_layer(layer, x):
    """The definition, token by token."""
    results = []
    for token in x:
        probabilities = torch.softmax(layer.router.weight @ token, dim=0)
        best = probabilities.argsort(descending=True)[: layer.top_k].tolist()
        results.append(sum(probabilities[e] * layer.experts[str(e)](token) for e in best))
    return torch.stack(results)


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_the_layer_is_its_definition_token_by_token(top_k, kind):
    layer, (x, grad) = layer_of(top_k, kind=kind, bias=True), tokens_of()
    runs = []
    for run in (layer, lambda x: slow_layer(layer, x)):
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        output = run(mine)
        output.backward(grad)
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        runs.append((output.detach(), mine.grad, grads))
    for ours, slow in zip(runs[0][:2], runs[1][:2]):
        torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-13)
    for name, slow in runs[1][2].items():
        torch.testing.assert_close(runs[0][2][name], slow, rtol=1e-12, atol=1e-13)
    assert int(layer.rows_per_expert.sum()) == NUM_TOKENS * top_k


def run_layer(comm, top_k):
    layer, (x, grad) = expert_parallel(layer_of(top_k), comm), tokens_of()
    sizes = shard_sizes(NUM_TOKENS, comm.world_size)
    mine = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    x = x[mine].requires_grad_()
    before = len(comm.ledger.entries)
    output = layer(x)
    output.backward(grad[mine])
    calls = [(entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:]]
    return mine, output.detach(), x.grad, copy_of_grads(layer), layer.rows_per_expert, calls


def check_layer(results, top_k):
    layer, (x, grad) = layer_of(top_k), tokens_of()
    x = x.requires_grad_()
    output = layer(x)
    output.backward(grad)
    for mine, out, grad_x, grads, _, _ in results:
        for found, true in ((out, output.detach()[mine]), (grad_x, x.grad[mine])):
            assert float((found - true).abs().max()) < BOUND * float(true.abs().max())
        for name, found in grads.items():
            true = layer.get_parameter(name).grad
            if name == "router.weight":  # replicated: this rank's tokens alone are in it
                found = sum(one[3][name] for one in results)
            assert float((found - true).abs().max()) <= BOUND * float(true.abs().max()), name
    held = [name for one in results for name in one[3] if name.startswith("experts.")]
    assert sorted(held) == sorted(expert_names(layer))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_shared_layer_equals_one_process_and_sends_what_was_predicted(world_size, top_k):
    results = run_ranks(run_layer, world_size, args=(top_k,))
    check_layer(results, top_k)
    rows = [one[4].tolist() for one in results]
    assert sum(map(sum, rows)) == NUM_TOKENS * top_k
    for traffic, (*_, calls) in zip(predict_experts(rows, D, 8), results, strict=True):
        there, back = traffic.there_bytes, traffic.back_bytes
        predicted = [traffic.counts_bytes, there, back, there, back] if world_size > 1 else []
        assert calls == [("all_to_all", n_bytes) for n_bytes in predicted]
        assert sum(predicted) == traffic.forward_bytes + traffic.backward_bytes


@pytest.mark.parametrize("runtime", ["gloo", "mpich", "openmpi"])
def test_a_layer_shared_by_processes_equals_one_process(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        check_layer(run_ranks(run_layer, 3, backend=backend, args=(2,)), 2)


def test_ranks_that_get_no_row_or_have_no_token_take_part():
    def program(comm):
        layer = layer_of(1)
        with torch.no_grad():  # the first features decide: all tokens go to expert 0
            layer.router.weight.zero_()[0, 0] = 1.0
        expert_parallel(layer, comm)
        x = torch.ones(0 if comm.rank == 1 else 4, D, dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        return {name: float(grad.abs().max()) for name, grad in copy_of_grads(layer).items()}

    grads = run_ranks(program, 3)
    assert grads[0]["experts.0.up_proj.weight"] > 0
    assert grads[0]["experts.1.up_proj.weight"] == 0
    assert grads[2]["experts.8.up_proj.weight"] == 0
    assert grads[1]["router.weight"] == 0 < grads[2]["router.weight"]


def test_an_exchange_is_the_transpose_of_its_gradient():
    """<A x, y> = <x, A' y> over all ranks, for rows that all ranks send to all."""
    sizes = [[0, 2, 1], [3, 0, 2], [1, 1, 4]]  # rows from each rank to each

    def program(comm):
        generator = torch.Generator().manual_seed(comm.rank)
        sent, received = sizes[comm.rank], [row[comm.rank] for row in sizes]
        x, y = (
            torch.randn(sum(n), 2, generator=generator, dtype=torch.float64)
            for n in (sent, received)
        )
        x.requires_grad_()
        forward = exchange_rows(x, comm, sent, received)
        (back,) = torch.autograd.grad(forward, x, y)
        return float((forward * y).sum().detach()), float((x * back).sum().detach())

    forward, back = (sum(column) for column in zip(*run_ranks(program, 3)))
    assert abs(forward - back) < 1e-12 * abs(forward)


def model_of(top_k=2):
    model = tiny_model(positions="learned", norm="layer", bias=True)
    torch.manual_seed(5)
    for block in model.blocks:
        block.feed_forward = MixtureOfExperts(8, 16, 12, top_k=top_k, bias=True).double()
    return model


def run_of(model, gradients):
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(NUM_STEPS):
        loss, num_tokens = gradients(tiny_batch(step))
        assert num_tokens == int((tiny_batch(step)[1] != IGNORE).sum())
        losses.append(float(loss))
        grads.append(copy_of_grads(model))
        optimizer.step()
    return losses, grads, copy_of_weights(model)


def train(comm):
    model, sizes = expert_parallel(model_of(), comm), shard_sizes(BATCH_SIZE, comm.world_size)
    mine = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))

    def gradients(batch):
        return expert_gradients(model, comm, tuple(one[mine] for one in batch), causal_objective)

    return run_of(model, gradients)


def check_trainings(results):
    """Every rank's weights are among those of one process, and all experts are on some rank."""
    model = model_of()
    losses, grads, weights = run_of(
        model, lambda batch: accumulate_gradients(model, batch, causal_objective)
    )
    unseen, keys = set(weights), [name for name in weights if name.endswith("k_proj.bias")]
    # An expert that no token visits in some step has a gradient of zero there, exactly.
    idle = [name for name in expert_names(model) if any(not one[name].any() for one in grads)]
    assert 2 * len(idle) < len(expert_names(model))
    for found in results:
        names = found[2].keys()
        for name in set(names).intersection(idle):
            assert [bool(one[name].any()) for one in found[1]] == [
                bool(one[name].any()) for one in grads
            ]
        for name in set(names).difference(keys):
            scale = max(float(weights[name].abs().max()), NUM_STEPS * LR)
            assert float((found[2][name] - weights[name]).abs().max()) < BOUND * scale
        true = [{name: one[name] for name in names} for one in grads]
        true = losses, true, {name: weights[name] for name in names}
        check_same_run(found, true, set(names).intersection([*keys, *idle]))
        unseen -= names
    assert not unseen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_training_with_experts_on_several_ranks_equals_one_process(world_size):
    check_trainings(run_ranks(train, world_size))


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_a_training_on_processes_equals_one_process(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        check_trainings(run_ranks(train, 2, backend=backend))


def test_what_does_not_fit_is_refused_before_anything_is_sent():
    def program(comm):
        wrongs = {
            "num_experts = 12, remainder 2.*\n.*world_size=4 or world_size=6": layer_of(1),
            "none": nn.Linear(2, 2),
        }
        for named, model in wrongs.items():
            with pytest.raises(InputError, match=named):
                expert_parallel(model, comm)
        return comm.ledger.num_calls()

    assert run_ranks(program, 5) == [0] * 5


def test_a_second_sharing_out_too_many_choices_and_wrong_tables_are_refused():
    def program(comm):
        expert_parallel(expert_parallel(layer_of(1), comm), comm)

    with pytest.raises(RankError, match="shared out before"):
        run_ranks(program, 2)
    for wrong in (
        lambda: MixtureOfExperts(4, 4, 2, top_k=3),
        lambda: MixtureOfExperts(4, 4, 0),
        lambda: predict_experts([[1, 2], [3]], 4, 8),
        lambda: predict_experts([[1, 2, 3], [1, 2, 3]], 4, 8),
        lambda: predict_experts([[1, -2], [1, 2]], 4, 8),
        lambda: rows_per_rank([]),
    ):
        with pytest.raises(InputError):
            wrong()


def test_a_batch_without_a_target_is_refused_on_every_rank():
    def program(comm):
        model = expert_parallel(model_of(), comm)
        ids, targets = tiny_batch(0)
        with pytest.raises(InputError, match="at least one target"):
            expert_gradients(model, comm, (ids, torch.full_like(targets, IGNORE)), causal_objective)
        return True

    assert all(run_ranks(program, 2))
