"""All axes at once equal one process; layouts that cannot be are refused with the nearest."""

import comm_runtimes
import pytest
import torch
from hybrid_cases import FIRST, GPT, LLAMA, make_hybrid, train, whole_batch, zero_names
from parallel_cases import check_same_run, serial_run, tiny_model

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError
from slimlab.demos.hybrid import payload_by_axis
from slimlab.parallel.hybrid import Hybrid
from slimlab.parallel.hybrid_stages import schedule_for
from slimlab.plan.hybrid_step import hybrid_held_bytes, hybrid_step_bytes, stage_shapes
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import clip_gradients

LAYOUTS = {
    "data x tensor": {"data": 2, "tensor": 2},
    "data x tensor, ZeRO 1": {"data": 2, "tensor": 2, "zero_stage": 1},
    "data x tensor, ZeRO 2": {"data": 2, "tensor": 2, "zero_stage": 2},
    "data x tensor, ZeRO 3": {"data": 2, "tensor": 2, "zero_stage": 3},
    "data x tensor and sequence, ZeRO 1": {
        "data": 2, "tensor": 2, "sequence_parallel": True, "zero_stage": 1,
    },
    "tensor and sequence": {"tensor": 4, "sequence_parallel": True},
    "data x pipeline": {"data": 2, "pipeline": 2},
    "data x pipeline, ZeRO 1, GPipe": {
        "data": 2, "pipeline": 2, "zero_stage": 1, "schedule": "gpipe",
    },
    "tensor x pipeline": {"tensor": 2, "pipeline": 2},
    "tensor and sequence x pipeline": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
}  # fmt: skip


EIGHT = {"data": 2, "pipeline": 2, "tensor": 2, "zero_stage": 1, "micro_batch_size": 2}
CHUNKS = {"pipeline": 2, "data": 2, "num_chunks": 2, "recompute": "full"}


@pytest.fixture(scope="module")
def expected():
    found = {}
    for choices in (GPT, LLAMA):
        found[id(choices)] = serial_run(tiny_model(**choices), batch_of=whole_batch)
    return lambda choices: found[id(choices)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_gradients_and_weights_equal_one_process(name, expected):
    parallel = LAYOUTS[name] | {"micro_batch_size": 2}
    for found in run_ranks(train, 4, args=(parallel,)):
        check_same_run(found, expected(GPT), zero_names(GPT))


THREE_LAYERS = GPT | {"num_layers": 3}
TWO_AND_THREE = {
    "data 2": {"data": 2},
    "tensor 2": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline": 2},
    "tensor 3": {"tensor": 3},
    "pipeline 3": {"pipeline": 3},
}


@pytest.mark.parametrize(
    ("name", "runtime"),
    [(name, "threads") for name in TWO_AND_THREE]
    + [("tensor 3", "mpich"), ("pipeline 3", "gloo"), ("pipeline 3", "mpich")],
)
def test_two_and_three_ranks_equal_one_process(name, runtime):
    parallel = TWO_AND_THREE[name] | {"micro_batch_size": 2}
    if runtime != "threads" and (reason := comm_runtimes.why_not(runtime)):
        pytest.skip(reason)
    true = serial_run(tiny_model(**THREE_LAYERS), batch_of=whole_batch)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train, int(name[-1]), backend=backend, args=(parallel, THREE_LAYERS))
    for found in results:
        check_same_run(found, true, zero_names(THREE_LAYERS))


@pytest.mark.parametrize("choices", [GPT, LLAMA], ids=["gpt", "llama"])
def test_eight_ranks_on_three_axes_equal_one_process(choices, expected):
    for found in run_ranks(train, 8, args=(EIGHT, choices)):
        check_same_run(found, expected(choices), zero_names(choices))


def test_chunks_recomputation_and_untied_tables_equal_one_process():
    choices = FIRST | {"num_layers": 5}
    true = serial_run(tiny_model(**choices), batch_of=whole_batch)
    for found in run_ranks(train, 4, args=(CHUNKS, choices)):
        check_same_run(found, true, zero_names(choices))


# Each start of processes takes seconds: not all pairs of runtime and layout.
@pytest.mark.parametrize(
    ("runtime", "world_size", "parallel"),
    [
        ("gloo", 4, {"data": 2, "tensor": 2, "zero_stage": 1, "sequence_parallel": True}),
        ("gloo", 2, {"data": 2, "zero_stage": 3}),
        ("mpich", 4, {"tensor": 2, "pipeline": 2, "micro_batch_size": 2}),
        ("openmpi", 2, {"pipeline": 2, "micro_batch_size": 4}),
    ],
)
def test_processes_equal_one_process(runtime, world_size, parallel, expected):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train, world_size, backend=backend, args=(parallel,))
    for found in results:
        check_same_run(found, expected(GPT), zero_names())


def clip_once(comm, parallel, choices):
    hybrid = make_hybrid(comm, parallel, choices)
    hybrid.gradients(hybrid.share_of(whole_batch(0)))
    norm = hybrid.clip(0.25)
    return float(norm), hybrid.full_gradients()


@pytest.mark.parametrize("choices", [GPT, LLAMA], ids=["gpt", "key heads copied"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"data": 2, "tensor": 2, "zero_stage": 1},
        {"data": 2, "tensor": 2, "sequence_parallel": True},
        {"tensor": 4, "zero_stage": 3},
        {"pipeline": 2, "tensor": 2, "sequence_parallel": True},
        {"data": 2, "pipeline": 2, "zero_stage": 1},
    ],
)
def test_clipping_counts_every_parameter_once(parallel, choices):
    model = tiny_model(**choices)
    accumulate_gradients(model, whole_batch(0), causal_objective)
    true = float(clip_gradients(model.named_parameters(), 0.25))
    assert true > 0.25
    for norm, grads in run_ranks(clip_once, 4, args=(parallel, choices)):
        assert norm == pytest.approx(true, rel=1e-13)
        for name, param in model.named_parameters():
            assert torch.allclose(grads[name], param.grad, rtol=1e-11, atol=1e-14)


def three_ranks(comm):
    """Three ranks need a batch that three replicas divide, and heads that three ranks divide."""
    found = []
    for parallel in ({"data": 3, "zero_stage": 2}, {"tensor": 3, "sequence_parallel": True}):
        hybrid = make_hybrid(comm, parallel)
        batch = tuple(one[:6] for one in whole_batch(0))
        loss, num_tokens = hybrid.gradients(hybrid.share_of(batch))
        found.append((float(loss), num_tokens, hybrid.full_gradients()))
    return found


def test_three_ranks_equal_one_process():
    model = tiny_model(**GPT)
    batch = tuple(one[:6] for one in whole_batch(0))
    loss, num_tokens = accumulate_gradients(model, batch, causal_objective)
    for results in run_ranks(three_ranks, 3):
        for found in results:
            assert found[0] == pytest.approx(float(loss), rel=1e-13)
            assert found[1] == num_tokens
            for name, param in model.named_parameters():
                assert torch.allclose(found[2][name], param.grad, rtol=1e-11, atol=1e-14)


def held_and_sent(comm, parallel):
    hybrid = make_hybrid(comm, parallel)
    before = len(comm.ledger.entries)
    hybrid.gradients(hybrid.share_of(whole_batch(0)))
    hybrid.step()
    payload = payload_by_axis(hybrid.mesh, comm.ledger.entries[before:])
    return hybrid.coordinates, hybrid.held_bytes(), payload


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bytes_held_and_sent_along_each_axis_are_predicted(zero_stage):
    parallel = ParallelConfig(**EIGHT | {"zero_stage": zero_stage})
    config = tiny_model(**GPT).config
    schedule = schedule_for(parallel, 2)
    for (replica, stage, _), held, payload in run_ranks(
        held_and_sent, 8, args=(EIGHT | {"zero_stage": zero_stage},)
    ):
        shapes = stage_shapes(config, 2, schedule, [1, 1], stage)
        predicted = hybrid_held_bytes(shapes, parallel, replica, 8)
        assert {name: held[name] for name in predicted} == predicted
        assert payload == hybrid_step_bytes(config, parallel, schedule, [1, 1], stage, 8)


def not_finite(comm, parallel, bad):
    hybrid = make_hybrid(comm, parallel)
    before = hybrid.full_weights()
    inputs, targets = hybrid.share_of(whole_batch(0))
    if hybrid.coordinates == bad:
        hook = hybrid.model.final_norm.register_forward_hook(lambda *given: given[2] * torch.nan)
    with pytest.raises(InputError) as caught:
        hybrid.gradients((inputs, targets))
    with pytest.raises(InputError, match="gradients before step"):
        hybrid.step()
    after = hybrid.full_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if hybrid.coordinates == bad:
        hook.remove()
    hybrid.gradients((inputs, targets))
    return str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "bad"),
    [
        ({"data": 2, "tensor": 2, "zero_stage": 1}, (1, 0, 1)),
        ({"data": 2, "pipeline": 2}, (0, 1, 0)),
        ({"pipeline": 2, "tensor": 2}, (0, 1, 0)),
    ],
)
def test_a_gradient_that_is_not_finite_is_told_to_every_rank_with_its_place(parallel, bad):
    texts = run_ranks(not_finite, 4, args=(parallel, bad))
    assert len(set(texts)) == 1
    data, pipeline, tensor = bad
    assert f"(data {data}, pipeline {pipeline}, tensor {tensor})" in texts[0]
    assert f"data {1 - data}" not in texts[0] or parallel.get("data", 1) == 1


def dropout_masks(comm, parallel):
    """The mean of a tensor of ones behind each rank's dropout, in two steps, and step one again."""
    hybrid = make_hybrid(comm, parallel, GPT | {"dropout": 0.5})
    found = []
    for step in (0, 1, 0):
        hybrid.num_steps = step
        hybrid.gradients(hybrid.share_of(whole_batch(0)))
        generator = hybrid.model.tensor_parallel.generator
        found.append(int(torch.randint(2**62, (), generator=generator)))
    return found


def test_dropout_follows_from_step_and_place_alone():
    for parallel, same in (({"data": 2, "tensor": 2}, True), ({"pipeline": 2, "data": 2}, False)):
        rows = run_ranks(dropout_masks, 4, args=(parallel,))
        assert all(first == again != second for first, second, again in rows)
        firsts = [row[0] for row in rows]
        assert len(set(firsts)) == (2 if same else 4)
        assert (firsts[0] == firsts[1]) == same


def refused(comm, parallel, choices, batch_size):
    """What is refused before anything is sent; the ledger is looked at."""
    batch, sent = tuple(one[:batch_size] for one in whole_batch(0)), 0
    try:
        hybrid = make_hybrid(comm, parallel, choices)
        sent = len(comm.ledger.entries)
        hybrid.share_of(batch)
    except InputError as error:
        assert len(comm.ledger.entries) == sent
        return str(error)


@pytest.mark.parametrize(
    ("parallel", "change", "words"),
    [
        ({"data": 3}, {}, ["3 x 1 x 1 = 3", "give data=4, pipeline=1, tensor=1, or start 3 ranks"]),
        ({"data": 2, "tensor": 4}, {}, ["2 x 1 x 4 = 8", "give data=1, pipeline=1, tensor=4"]),
        ({"pipeline": 4}, {}, ["num_layers = 2, pipeline = 4", "give pipeline=2 at most"]),
        (
            {"pipeline": 2, "data": 2, "num_chunks": 2},
            {},
            ["num_chunks = 2", "a model of 4 layers"],
        ),
        ({"data": 4, "num_chunks": 2}, {}, ["two stages or more", "give num_chunks=1"]),
        ({"pipeline": 2, "data": 2, "zero_stage": 2}, {}, ["zero_stage = 2", "give zero_stage=1"]),
        ({"pipeline": 2, "data": 2, "zero_stage": 3}, {}, ["zero_stage = 3", "once more for each"]),
        ({"tensor": 4}, {"num_heads": 6, "d_model": 12}, ["num_heads = 6", "take tensor=3 or 6"]),
        ({"tensor": 4}, {"vocab_size": 13}, ["vocab_size = 13", "vocab_size=12 or 16"]),
        ({"data": 4, "recompute": "selective"}, {}, ["selective", 'recompute="full"']),
        ({"data": 4, "micro_batch_size": 2}, {}, ["batch_size = 7", "choose batch_size from 8"]),
        ({"data": 2, "tensor": 2}, {}, ["batch_size = 7, data = 2", "batch_size from 6, 8"]),
    ],
)
def test_what_does_not_fit_is_refused_by_every_rank_with_the_nearest(parallel, change, words):
    texts = run_ranks(refused, 4, args=(parallel, GPT | change, 7))
    assert len(set(texts)) == 1
    assert all(word in texts[0] for word in words), texts[0]


def test_a_stage_that_is_frozen_as_a_whole_is_refused_by_every_rank_before_it_communicates():
    def program(comm):
        model = tiny_model(**GPT)
        for name, param in model.named_parameters():
            param.requires_grad_(not name.startswith(("embedding", "blocks.0")))
        with pytest.raises(InputError, match="2 stages, none on stage 0"):
            Hybrid(model, comm, ParallelConfig(pipeline=2), lr=0.1)
        return len(comm.ledger.entries)

    assert run_ranks(program, 2) == [0, 0]


def test_another_objective_and_another_model_are_refused():
    def program(comm):
        hybrid = make_hybrid(comm, {"data": 2})
        with pytest.raises(InputError, match="the objective of a decoder"):
            hybrid.gradients(hybrid.share_of(whole_batch(0)), lambda model, batch: None)
        with pytest.raises(InputError, match="a whole Decoder"):
            Hybrid(torch.nn.Linear(2, 2), comm, ParallelConfig(data=2), lr=0.1)
        with pytest.raises(InputError, match="a layout"):
            Hybrid(torch.nn.Linear(2, 2), comm, {"data": 2}, lr=0.1)

    run_ranks(program, 2)
