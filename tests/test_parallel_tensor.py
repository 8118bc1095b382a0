"""Tensor parallelism equals one process and DTensor; its calls and its bytes are predicted."""

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BOUND,
    LR,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    tiny_model,
    zero_gradient_names,
)
from tensor_cases import (
    FIRST,
    GPT,
    INPUT,
    LLAMA,
    MULTI_QUERY,
    adjoint_errors,
    batch_of,
    serial,
    train,
)
from tensor_dtensor import train_dtensor

from slimlab.comm.launch import run_ranks
from slimlab.parallel.data import DataParallel
from slimlab.parallel.layout import SEQUENCE_PARALLEL, Layout
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.tensor import tensor_parallel, whole_logits
from slimlab.parallel.tensor_loss import tensor_parallel_objective, vocabulary_parallel_loss
from slimlab.parallel.tensor_state import (
    clip_whole_gradients,
    gather_optimizer,
    gather_state,
    gather_whole,
    load_optimizer,
    load_state,
)
from slimlab.plan.tensor_parallel import predict_clip
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective, token_loss
from slimlab.train.optimizer import clip_gradients

MODES = {"activations replicated": {}, "sequence cut": {"sequence_parallel": True}}
HEADS = (("heads", "tensor"), ("kv_heads", "tensor"))
LAYOUTS = {
    "heads": (HEADS, ("heads",)),
    "feed_forward": ((("feed_forward", "tensor"),), ("feed_forward",)),
    "vocabulary": ((("vocabulary", "tensor"),), ("vocabulary",)),
    "blocks": ((*HEADS, ("feed_forward", "tensor")), ("heads", "feed_forward")),
}


def check_runs(results, choices):
    expected = serial(choices)
    for found in results:
        check_same_run(found, expected, zero_gradient_names(tiny_model(**choices)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("world_size", "choices"),
    [(1, GPT), (2, GPT), (3, GPT), (4, GPT), (2, LLAMA), (4, LLAMA), (3, MULTI_QUERY), (2, FIRST)],
)
def test_losses_gradients_and_weights_equal_one_process(world_size, choices, mode):
    check_runs(run_ranks(train, world_size, args=(choices, MODES[mode])), choices)


def test_eight_ranks_of_which_four_share_a_key_head_equal_one_process():
    sizes = {"vocab_size": 16, "d_model": 16, "num_heads": 8, "d_ff": 16, "num_layers": 1}
    choices = {**LLAMA, **sizes}
    check_runs(run_ranks(train, 8, args=(choices, {})), choices)


def train_in_groups(comm):
    """Adjoints and trainings in groups of 4, of 3 and 1, and of 2 ranks."""
    found = []
    for color in (0, comm.rank // 3, comm.rank // 2):
        group = comm.split(color)
        errors = adjoint_errors(group)
        runs = [
            (choices, train(group, choices, options))
            for choices in ([GPT] if group.world_size == 3 else [GPT, LLAMA])
            for options in MODES.values()
        ]
        found.append((group.world_size, errors, runs))
    return found


@pytest.mark.parametrize("runtime", ["gloo", "mpich", "openmpi"])
def test_processes_equal_one_process_in_groups_of_one_two_three_and_four(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train_in_groups, 4, backend=backend)
    expected = {id(choices): serial(choices) for choices in (GPT, LLAMA)}
    sizes = set()
    for groups in results:
        for world_size, errors, runs in groups:
            sizes.add(world_size)
            assert max(errors.values()) < 1e-14, errors
            for choices, found in runs:
                one = GPT if choices == GPT else LLAMA
                check_same_run(found, expected[id(one)], zero_gradient_names(tiny_model(**one)))
    assert sizes == {1, 2, 3, 4}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_collective_is_the_transpose_of_its_backward_pass(world_size):
    for errors in run_ranks(adjoint_errors, world_size):
        assert max(errors.values()) < 1e-14, errors


@pytest.mark.parametrize("mode", MODES)
def test_ours_equals_dtensor_and_both_equal_one_process(mode):
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)
    options = MODES[mode]

    def program(comm):
        cases = (GPT, LLAMA)
        return [
            (train(comm, choices, options), train_dtensor(comm, choices, bool(options)))
            for choices in cases
        ]

    for runs in run_ranks(program, 2, backend="gloo"):
        for choices, (ours, theirs) in zip((GPT, LLAMA), runs):
            check_runs([ours, theirs], choices)
            check_same_run(ours, theirs, zero_gradient_names(tiny_model(**choices)))


@pytest.mark.parametrize("cut", LAYOUTS)
def test_each_rule_of_the_layout_works_by_itself(cut):
    rules, _ = LAYOUTS[cut]
    check_runs(run_ranks(train, 2, args=(GPT, {"layout": Layout(rules)})), GPT)


def test_the_sequence_rule_means_sequence_parallelism_with_or_without_the_vocabulary():
    rules = (*LAYOUTS["blocks"][0], ("sequence", "tensor"))
    for layout in (SEQUENCE_PARALLEL, Layout(rules)):
        check_runs(run_ranks(train, 2, args=(GPT, {"layout": layout})), GPT)


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_and_micro_batches_change_nothing(mode):
    check_runs(run_ranks(train, 2, args=(MULTI_QUERY, MODES[mode], "block")), MULTI_QUERY)
    whole = serial(GPT)
    for losses, grads, weights in run_ranks(train, 2, args=(GPT, MODES[mode], "none", 2)):
        for one, true in zip(grads, whole[1]):  # of the input each micro-batch has a part
            one.pop(INPUT)
            true.pop(INPUT, None)
        check_same_run((losses, grads, weights), whole, zero_gradient_names(tiny_model(**GPT)))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_dropout_behind_sums_draws_what_one_process_draws(recompute):
    choices = {**LLAMA, "dropout": 0.3}

    def program(comm):
        torch.manual_seed(1000 + comm.rank)  # nobody draws from the global generator
        return train(comm, choices, {"seed": 7}, recompute)

    model = tiny_model(**choices)
    torch.manual_seed(7)
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(3):
        loss, _ = accumulate_gradients(model, batch_of(step), causal_objective)
        losses.append(float(loss))
        grads.append(copy_of_grads(model))
        optimizer.step()
    for found in run_ranks(program, 2):
        for one in found[1]:
            one.pop(INPUT)
        check_same_run(found, (losses, grads, copy_of_weights(model)))


def test_dropout_on_slices_draws_apart_and_as_often():
    def program(comm, options):
        model = tiny_model(**{**GPT, "dropout": 0.25})
        tensor_parallel(model, comm, **options)
        ones = torch.ones(6, 2000, 5, dtype=torch.float64)
        return model.dropout(ones), model.eval().dropout(ones)

    drawn = run_ranks(program, 2, args=({"sequence_parallel": True},))
    (one, other), kept = (result[0] for result in drawn), (1 - 0.25)
    for mask in (one, other):
        assert set(mask.unique().tolist()) == {0.0, 1 / kept}
        # 60 000 draws: five standard deviations of their mean are 0.0089.
        assert abs(float((mask > 0).double().mean()) - kept) < 0.0089
    both = float(((one > 0) & (other > 0)).double().mean())
    assert abs(both - kept**2) < 0.0102  # independent
    (one, other) = (result[0] for result in run_ranks(program, 2, args=({},)))
    assert torch.equal(one, other)
    assert all(bool((result[1] == 1).all()) for result in drawn)


def train_on_mesh(comm, choices, options):
    mesh = Mesh(comm, MeshShape(data=2, tensor=2), hosts=["here"] * 4)
    model = tiny_model(seed=comm.rank, **choices)
    tensor_parallel(model, mesh.group("tensor"), **options)
    replica = DataParallel(model, mesh.group("data"), bucket_bytes=3000)
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(3):
        part = [slice(0, 3), slice(3, 5)][mesh.coordinates[0]]
        part = tuple(one[part] for one in batch_of(step))
        loss, _ = replica.gradients(part, tensor_parallel_objective, 2)
        losses.append(float(loss))
        grads.append(gather_whole(model, copy_of_grads(model)))
        optimizer.step()
    return losses, grads, gather_whole(model, dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("runtime", "choices", "mode"),
    [
        ("threads", GPT, "activations replicated"),
        ("threads", MULTI_QUERY, "sequence cut"),
        ("gloo", GPT, "sequence cut"),
        ("mpich", MULTI_QUERY, "activations replicated"),
    ],
)
def test_data_and_tensor_parallelism_on_a_mesh_equal_one_process(runtime, choices, mode):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    expected = serial(choices)
    for one in expected[1]:
        one.pop(INPUT)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train_on_mesh, 4, backend=backend, args=(choices, MODES[mode]))
    for found in results:
        check_same_run(found, expected, zero_gradient_names(tiny_model(**choices)))


@pytest.mark.parametrize(("world_size", "choices"), [(2, GPT), (4, LLAMA), (3, MULTI_QUERY)])
def test_whole_weights_are_made_and_cut_again(world_size, choices):
    def program(comm):
        model = tensor_parallel(tiny_model(seed=1, **choices), comm)
        state = tiny_model(seed=2, **choices).state_dict()
        load_state(model, state)
        ids = batch_of(0)[0]
        return gather_state(model), whole_logits(model, ids)

    other = tiny_model(seed=2, **choices)
    for state, logits in run_ranks(program, world_size):
        assert list(state) == list(other.state_dict())
        assert all(torch.equal(state[name], one) for name, one in other.state_dict().items())
        torch.testing.assert_close(logits, other(batch_of(0)[0]), rtol=0, atol=1e-13)
        other.load_state_dict(state)


def go_on(comm, choices, start, steps):
    """Train some steps from whole weights and optimizer state; returns them afterwards."""
    model = tensor_parallel(tiny_model(**choices), comm)
    optimizer = optimizer_of(model)
    if start is not None:
        load_state(model, start[0])
        load_optimizer(model, optimizer, start[1])
    for step in steps:
        accumulate_gradients(model, batch_of(step), tensor_parallel_objective)
        optimizer.step()
    return gather_state(model), gather_optimizer(model, optimizer)


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 1), (1, 2)])
def test_a_run_that_goes_on_with_other_ranks_ends_with_the_weights_of_one_process(first, second):
    _, _, weights = serial(LLAMA)
    start = run_ranks(go_on, first, args=(LLAMA, None, range(2)))[0]
    for state, held in run_ranks(go_on, second, args=(LLAMA, start, range(2, 3))):
        assert all(float(one["step"]) == 3 for one in held.values())
        for name, true in weights.items():
            scale = max(float(true.abs().max()), 3 * LR)
            assert float((state[name] - true).abs().max()) < BOUND * scale


def test_dropout_goes_on_where_it_was():
    def program(comm, goes_on):
        model = tensor_parallel(tiny_model(**GPT, dropout=0.5), comm, sequence_parallel=True)
        tensor_parallel_objective(model, batch_of(0))
        if goes_on:
            state = model.tensor_parallel.generator.get_state()
            model = tensor_parallel(tiny_model(**GPT, dropout=0.5), comm, sequence_parallel=True)
            model.tensor_parallel.generator.set_state(state)
        return tensor_parallel_objective(model, batch_of(0))[0].item()

    assert run_ranks(program, 2, args=(True,)) == run_ranks(program, 2, args=(False,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world_size", "choices"), [(2, GPT), (4, LLAMA)])
def test_clipping_counts_every_parameter_of_the_whole_model_once(world_size, choices, mode):
    def program(comm):
        model = tensor_parallel(tiny_model(**choices), comm, **MODES[mode])
        accumulate_gradients(model, batch_of(0), tensor_parallel_objective)
        before = len(comm.ledger.entries)
        norms = [clip_whole_gradients(model, max_norm) for max_norm in (float("inf"), 0.01)]
        calls = [(entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:]]
        assert calls == list(predict_clip() * 2)
        return norms, gather_whole(model, copy_of_grads(model))

    model = tiny_model(**choices)
    accumulate_gradients(model, batch_of(0), causal_objective)
    norm = clip_gradients(model.parameters(), 0.01)
    for norms, grads in run_ranks(program, world_size):
        assert all(abs(float(one / norm) - 1) < BOUND for one in norms)
        for name, param in model.named_parameters():
            torch.testing.assert_close(grads[name], param.grad, rtol=0, atol=BOUND * 0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_over_a_cut_vocabulary_equals_that_of_whole_logits(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(4, 5, 12, generator=generator, dtype=torch.float64) * 30).to(dtype)
    targets = batch_of(0)[1][:4, :5]

    def program(comm):
        own = logits.chunk(comm.world_size, -1)[comm.rank].clone().requires_grad_()
        loss_sum, num_tokens = vocabulary_parallel_loss(own, targets, comm)
        (loss_sum / num_tokens).backward()
        return loss_sum.detach(), num_tokens, own.grad

    whole = logits.clone().requires_grad_()
    loss_sum, num_tokens = token_loss(whole, targets)
    (loss_sum / num_tokens).backward()
    accuracy = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    grad_accuracy = 4e-3 if dtype == torch.bfloat16 else accuracy  # 8 bits each
    for world_size in (1, 2, 3):
        results = run_ranks(program, world_size)
        grad = torch.cat([result[2] for result in results], dim=-1)
        torch.testing.assert_close(grad, whole.grad, rtol=grad_accuracy, atol=accuracy)
        for loss, count, _ in results:
            assert (loss.dtype, count) == (loss_sum.dtype, num_tokens)
            assert abs(float(loss / loss_sum.detach()) - 1) < accuracy
