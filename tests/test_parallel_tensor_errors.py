"""What tensor parallelism refuses, on every rank alike, with the nearest choice that would do."""

import pytest
import torch
from parallel_cases import copy_of_grads, copy_of_weights, optimizer_of, tiny_model
from tensor_cases import GPT, LLAMA, batch_of

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import CommunicationError
from slimlab.config import InputError
from slimlab.model.generation import generate
from slimlab.parallel.layout import Layout
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_loss import tensor_parallel_objective, vocabulary_parallel_loss
from slimlab.parallel.tensor_state import clip_whole_gradients, load_optimizer, load_state
from slimlab.train.accumulate import accumulate_gradients

HEADS = (("heads", "tensor"), ("kv_heads", "tensor"))
BAD = "blocks.1.feed_forward.up_proj.weight"


def test_nan_in_one_ranks_gradient_is_named_on_every_rank_and_no_weight_changes():
    def program(comm):
        model = tensor_parallel(tiny_model(**GPT), comm)
        accumulate_gradients(model, batch_of(0), tensor_parallel_objective)
        before = copy_of_grads(model)
        if comm.rank == 1:
            model.get_parameter(BAD).grad[0, 0] = float("nan")
        with pytest.raises(InputError) as caught:
            clip_whole_gradients(model, 1.0)
        others = {name: grad for name, grad in copy_of_grads(model).items() if name != BAD}
        assert all(torch.equal(grad, before[name]) for name, grad in others.items())
        return str(caught.value)

    results = run_ranks(program, 3)
    assert len(set(results)) == 1
    assert f"in rank 1: {BAD}\n" in results[0]


@pytest.mark.parametrize(
    ("world_size", "choices", "expected"),
    [
        (5, GPT, "take a group of 4 or 6; or make the model with num_heads=10 or 15"),
        (5, GPT, "what does not fit: num_heads, d_ff, vocab_size"),
        (
            4,
            {**GPT, "vocab_size": 50257},
            "take a group of 1; or make the model with vocab_size=50256",
        ),
        (3, LLAMA, "what does not fit: num_kv_heads"),
        (3, LLAMA, "take a group of 2 or 4"),
        (2, {**GPT, "num_heads": 3, "d_head": 4}, "num_heads=2 or 4"),
    ],
)
def test_sizes_that_do_not_divide_get_the_nearest_that_do(world_size, choices, expected):
    def program(comm):
        with pytest.raises(InputError) as caught:
            tensor_parallel(tiny_model(**choices), comm)
        return str(caught.value), [entry.n_bytes for entry in comm.ledger.entries]

    for message, sent in run_ranks(program, world_size):
        assert expected in message
        assert sent == [8]  # the comparison of models, and nothing after it


@pytest.mark.parametrize(
    ("layout", "options", "expected"),
    [
        (Layout((("heads", "tensor"),)), {}, "a rule for heads alone"),
        (Layout((("model", "tensor"),)), {}, "('model', 'tensor')"),
        (Layout((("vocabulary", "data"),)), {}, "('vocabulary', 'data')"),
        (Layout((("features", "tensor"),)), {}, "('features', 'tensor'), which matches nothing"),
        (Layout(HEADS), {"sequence_parallel": True}, "rules for heads, kv_heads"),
    ],
)
def test_layouts_that_cannot_be_done_are_refused_on_every_rank(layout, options, expected):
    def program(comm):
        with pytest.raises(InputError) as caught:
            tensor_parallel(tiny_model(**GPT), comm, layout=layout, **options)
        return str(caught.value)

    for message in run_ranks(program, 2):
        assert expected in message


def test_a_rank_with_another_model_or_other_arguments_is_named_on_every_rank():
    def other_choices(comm):
        choices = {**GPT, "num_heads": 4} if comm.rank == 2 else GPT  # the same shapes
        tensor_parallel(tiny_model(**choices), comm)

    def other_arguments(comm):
        tensor_parallel(tiny_model(**GPT), comm, seed=comm.rank // 2)

    def program(comm):
        for wrong in (other_choices, other_arguments):
            with pytest.raises(InputError, match="on rank 2 than on rank 0"):
                wrong(comm)
        return [entry.n_bytes for entry in comm.ledger.entries]

    assert run_ranks(program, 3) == [[8, 8]] * 3


@pytest.mark.parametrize(
    ("batch", "options", "expected"),
    [
        ((slice(5), 7), {"sequence_parallel": True}, "give batches of 6 or 8 positions"),
        ((slice(5), 12), {}, None),
    ],
)
def test_positions_that_do_not_divide_are_refused_before_anything_is_sent(batch, options, expected):
    rows, length = batch

    def program(comm):
        model = tensor_parallel(tiny_model(**GPT), comm, **options)
        before = len(comm.ledger.entries)
        inputs, targets = (one[rows, :length] for one in batch_of(0))
        if expected is None:
            return tensor_parallel_objective(model, (inputs, targets))[1] > 0
        with pytest.raises(InputError, match=expected):
            tensor_parallel_objective(model, (inputs, targets))
        return len(comm.ledger.entries) == before

    assert run_ranks(program, 2) == [True, True]


def test_targets_outside_the_vocabulary_are_named_before_the_loss_is_sent():
    def program(comm):
        with pytest.raises(InputError, match=r"targets\[0, 1\] = 12"):
            vocabulary_parallel_loss(torch.zeros(1, 2, 6), torch.tensor([[3, 12]]), comm)
        with pytest.raises(InputError, match="targets"):
            vocabulary_parallel_loss(torch.zeros(1, 2, 6), torch.zeros(1, 4).long(), comm)
        return comm.ledger.num_calls()

    assert run_ranks(program, 2) == [0, 0]


def test_a_model_is_cut_once_and_only_decoders_are():
    def program(comm):
        model = tensor_parallel(tiny_model(**GPT), comm)
        with pytest.raises(InputError, match="cut before"):
            tensor_parallel(model, comm)
        encoder = tiny_model(**{**GPT, "kind": "encoder"})
        with pytest.raises(InputError, match="given: a Encoder"):
            tensor_parallel(encoder, comm)

    run_ranks(program, 2)


def test_weights_of_another_model_are_refused_before_one_is_changed():
    def program(comm):
        model = tensor_parallel(tiny_model(**GPT), comm)
        before = copy_of_weights(model)
        for choices in ({**GPT, "d_ff": 48}, LLAMA):
            with pytest.raises(InputError, match="the same configuration"):
                load_state(model, tiny_model(**choices).state_dict())
        with pytest.raises(InputError, match="whole, not one part"):
            load_state(model, model.state_dict())
        optimizer = optimizer_of(model)
        with pytest.raises(InputError, match="the state of 36 parameters"):
            load_optimizer(model, optimizer, {"lm_head.weight": {}})
        assert all(torch.equal(before[n], one) for n, one in copy_of_weights(model).items())

    run_ranks(program, 2)


def test_a_rank_that_leaves_out_a_step_leaves_no_rank_waiting():
    def program(comm):
        model = tensor_parallel(tiny_model(**GPT), comm)
        for step in range(2 - comm.rank):
            accumulate_gradients(model, batch_of(step), tensor_parallel_objective)

    with pytest.raises(CommunicationError, match="all_reduce"):
        run_ranks(program, 2, timeout_s=30)


def test_frozen_parameters_stay_frozen_in_their_parts():
    def program(comm):
        model = tiny_model(**GPT)
        model.blocks[0].requires_grad_(False)
        tensor_parallel(model, comm, sequence_parallel=True)
        accumulate_gradients(model, batch_of(0), tensor_parallel_objective)
        return {name for name, p in model.named_parameters() if p.grad is None}

    frozen = {n for n, _ in tiny_model(**GPT).named_parameters() if n.startswith("blocks.0.")}
    assert run_ranks(program, 2) == [frozen, frozen]


def test_a_rank_with_another_batch_is_noticed_on_every_rank():
    def program(comm):
        model = tensor_parallel(tiny_model(**GPT), comm)
        tensor_parallel_objective(model, batch_of(0))
        swapped = tuple(one.flip(0) if comm.rank == 2 else one for one in batch_of(0))
        messages = []
        for batch in (batch_of(comm.rank // 2), swapped):
            with pytest.raises(InputError, match="batches that differ: .* of 60 targets") as caught:
                tensor_parallel_objective(model, batch)
            messages.append(str(caught.value))
        return messages

    results = run_ranks(program, 3)
    assert results[0] == results[1] == results[2]


def test_a_model_that_is_cut_does_not_write_from_its_part_of_the_vocabulary():
    def program(comm):
        model = tensor_parallel(tiny_model(**{**GPT, "vocab_size": 12}), comm)
        with pytest.raises(InputError, match="all 12 tokens of the vocabulary\ngiven: 6 of them"):
            generate(model, torch.tensor([[1, 2]]), 2, use_cache=False)

    run_ranks(program, 2)
