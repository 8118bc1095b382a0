"""Ring attention equals attention in one process, output and gradients; its messages counted."""

import copy
import threading

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BOUND,
    NUM_STEPS,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    tiny_model,
    zero_gradient_names,
)

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import InputError, ModelConfig
from slimlab.model.attention import scaled_dot_product_attention
from slimlab.parallel import context
from slimlab.parallel.context import ORDERS, context_positions, ring_attention
from slimlab.parallel.context_model import context_objective, context_parallel
from slimlab.parallel.data import DataParallel
from slimlab.plan.context import predict_ring, ring_scores
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import IGNORE, causal_objective

B, H, K, T, E, EV = 2, 4, 2, 48, 6, 5


def inputs_of(seq_len=T):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, seq_len, E), (B, K, seq_len, E), (B, K, seq_len, EV), (B, H, seq_len, EV)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def whole_run(causal):
    *inputs, grad = inputs_of()
    inputs = [one.requires_grad_() for one in inputs]
    output = scaled_dot_product_attention(*inputs, causal=causal)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def ring_run(comm, causal, order):
    cut = context_positions(T, rank=comm.rank, world_size=comm.world_size, order=order)
    *inputs, grad = (one[:, :, cut] for one in inputs_of())
    inputs = [one.requires_grad_() for one in inputs]
    output = ring_attention(*inputs, comm, causal=causal, order=order)
    return cut, [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def check_ring(results, causal):
    for true, *parts in zip(whole_run(causal), *(found for _, found in results), strict=True):
        scale = float(true.abs().max())
        for (cut, _), part in zip(results, parts, strict=True):
            assert float((part - true[:, :, cut]).abs().max()) < BOUND * scale


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_output_and_gradients_equal_one_process(world_size, causal, order):
    check_ring(run_ranks(ring_run, world_size, args=(causal, order)), causal)


@pytest.mark.parametrize("runtime", ["gloo", "mpich", "openmpi"])
@pytest.mark.parametrize("order", ORDERS)
def test_processes_equal_one_process(runtime, order):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        check_ring(run_ranks(ring_run, 3, backend=backend, args=(True, order)), True)


@pytest.mark.parametrize("order", ORDERS)
def test_the_positions_of_all_ranks_are_those_of_the_sequence(order):
    parts = [context_positions(24, rank=r, world_size=3, order=order) for r in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert {len(part) for part in parts} == {8}
    assert parts[0].tolist() == (
        [*range(8)] if order == "contiguous" else [*range(4), *range(20, 24)]
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_messages_and_bytes_are_those_predicted(world_size, causal):
    config = ModelConfig(
        vocab_size=2, seq_len=T, d_model=24, num_layers=1, num_heads=H, num_kv_heads=K, d_head=E
    )

    def program(comm):
        cut = context_positions(T, rank=comm.rank, world_size=comm.world_size)
        query, key, value = (one[:, :, cut].requires_grad_() for one in inputs_of()[:3])
        value = key * 2  # as wide as the keys, as in the book's models
        output = ring_attention(query, key, value, comm, causal=causal)
        forward = comm.ledger.num_calls("send")
        output.sum().backward()
        return forward

    results = run_ranks(program, world_size)
    found = predict_ring(config, B, T, world_size, item_bytes=8)
    for forward, ledger in zip(results, results.ledgers, strict=True):
        sends = [entry for entry in ledger.entries if entry.call == "send"]
        assert len(ledger.entries) == 2 * len(sends)  # and as many receives, and nothing else
        assert forward == found.forward_messages
        assert len(sends) == found.forward_messages + found.backward_messages
        assert {entry.n_bytes for entry in sends} <= {found.message_bytes}
        assert ledger.total_bytes("send") == found.payload_bytes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_scores_computed_are_those_predicted_and_zigzag_balances_them(
    world_size, order, monkeypatch
):
    counts, true_forward = {}, context.tiled_forward

    def counted(query, key, *rest):
        here = threading.get_ident()
        counts[here] = counts.get(here, 0) + query.shape[-2] * key.shape[-2]
        return true_forward(query, key, *rest)

    monkeypatch.setattr(context, "tiled_forward", counted)

    def program(comm):
        ring_run(comm, True, order)
        return counts[threading.get_ident()]

    found = tuple(run_ranks(program, world_size))
    assert found == ring_scores(T, world_size, order)
    assert (len(set(found)) == 1) == (order == "zigzag" or world_size == 1)
    if world_size > 1:
        assert max(ring_scores(T, world_size, "zigzag")) < max(ring_scores(T, world_size))


FORMS = {
    "rotary, grouped, swiglu": {"num_kv_heads": 1, "feed_forward": "swiglu"},
    "learned positions and biases": {"positions": "learned", "norm": "layer", "bias": True},
}


def long_model(form):
    return tiny_model(**FORMS[form] | {"seq_len": 24})


def long_batch(step):
    ids = torch.randint(11, (3, 25), generator=torch.Generator().manual_seed(step))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 20:] = targets[1, 3 + step :] = IGNORE
    return inputs, targets


def run_of(model, gradients):
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(NUM_STEPS):
        loss, _ = gradients(long_batch(step))
        losses.append(float(loss))
        grads.append(copy_of_grads(model))
        optimizer.step()
    return losses, grads, copy_of_weights(model)


def train(comm, form, order, recompute="none"):
    model = context_parallel(long_model(form), comm, order=order)
    model.recompute = recompute
    replica, objective = DataParallel(model, comm), context_objective(comm, order)
    return run_of(model, lambda batch: replica.gradients(batch, objective, micro_batch_size=2))


def check_trainings(results, form):
    model = long_model(form)
    expected = run_of(model, lambda batch: accumulate_gradients(model, batch, causal_objective))
    for found in results:
        check_same_run(found, expected, zero_gradient_names(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_training_whose_sequences_are_shared_equals_one_process(world_size, order, form):
    check_trainings(run_ranks(train, world_size, args=(form, order)), form)


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_a_training_on_processes_equals_one_process(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    form = "rotary, grouped, swiglu"
    with comm_runtimes.started_by(runtime) as backend:
        check_trainings(run_ranks(train, 2, backend=backend, args=(form, "zigzag")), form)


def test_blocks_that_are_computed_again_ask_the_ring_again():
    form = "rotary, grouped, swiglu"
    results = run_ranks(train, 2, args=(form, "zigzag", "block"))
    check_trainings(results, form)
    sends = [ledger.num_calls("send") for ledger in results.ledgers]
    plain = run_ranks(train, 2, args=(form, "zigzag")).ledgers
    num_forwards = NUM_STEPS * 2 * 2  # micro-batches and layers, one message each
    assert sends == [ledger.num_calls("send") + num_forwards for ledger in plain]


def test_weights_keep_their_names():
    def program(comm):
        model = tiny_model()
        before = copy.deepcopy(model.state_dict())
        after = context_parallel(model, comm).state_dict()
        return before.keys() == after.keys() and all(
            torch.equal(before[n], after[n]) for n in after
        )

    assert run_ranks(program, 1) == [True]


def test_what_a_ring_cannot_do_is_refused_before_anything_is_sent():
    def program(comm):
        query, key, value, _ = inputs_of(6)
        model = context_parallel(tiny_model(), comm)
        ids = torch.zeros(1, 4, dtype=torch.int64)
        wrongs = {
            "contiguous, zigzag": lambda: ring_attention(query, key, value, comm, order="ring"),
            "same positions": lambda: ring_attention(query[:, :, :3], key, value, comm),
            "in 2 pieces": lambda: ring_attention(
                query[:, :, :3], key[:, :, :3], value[:, :, :3], comm, order="zigzag"
            ),
            "float32 or float64": lambda: ring_attention(
                query.half(), key.half(), value.half(), comm
            ),
            "mask": lambda: model(ids, mask=torch.ones(4, 4, dtype=torch.bool)),
            "once": lambda: context_parallel(model, comm),
            "kind": lambda: context_parallel(tiny_model(kind="encoder"), comm),
            "to 4 or 6": lambda: context_positions(5, rank=0, world_size=2),
            "to 8 or 12": lambda: context_positions(9, rank=0, world_size=2, order="zigzag"),
        }
        for named, wrong in wrongs.items():
            with pytest.raises(InputError, match=named):
                wrong()
        return comm.ledger.num_calls()

    assert run_ranks(program, 2) == [0, 0]


def test_ranks_with_pieces_of_different_lengths_are_told_so():
    def program(comm):
        query, key, value, _ = inputs_of(4 + comm.rank)
        ring_attention(query, key, value, comm)

    with pytest.raises(RankError, match="keys and values of one shape"):
        run_ranks(program, 2, timeout_s=20)


def test_a_second_derivative_is_refused_also_where_it_would_lack_a_term():
    def program(comm):
        query, key, value, _ = inputs_of(4)
        query.requires_grad_()
        output = ring_attention(query, key, value, comm).sum() + query.square().sum()
        with pytest.raises(InputError, match="once"):
            torch.autograd.grad(output, query, create_graph=True)

    run_ranks(program, 1)


def test_plans_refuse_sizes_that_do_not_divide():
    for wrong in (lambda: ring_scores(9, 2), lambda: ring_scores(6, 2, "zigzag")):
        with pytest.raises(InputError):
            wrong()
